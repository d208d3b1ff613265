/* The data side of a ublk device: fetch, copy where the kernel's buffer is not registered, commit.
 *
 * Source: linux/ublk_cmd.h and Documentation/block/ublk.rst of Linux 6.12 and 7.2; the numbers below
 * are that header's.  Rule: a result is the whole length or an error.  Linux 7.3 takes a short
 * positive one for full success. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "internal.h"

#define FETCH_REQ 0xc0107520u             // _IOWR('u', 0x20, 16 bytes)
#define COMMIT_AND_FETCH_REQ 0xc0107521u
#define RESULT_ABORT (-ENODEV)
#define OP_FUA (1u << 13)
#define OP_NOUNMAP (1u << 15)
#define OP_NEED_REG_BUF (1u << 17)
#define AUTO_BUF_FALLBACK (1u << 16)      // flag bit 0 behind the 16-bit index
#define USER_COPY_BASE 0x80000000u
#define USER_COPY_TAG_SHIFT 25
#define MAX_BUFFER_BYTES (32u << 20)
#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

struct descriptor {
    uint32_t op_flags, sectors;
    uint64_t start;
    uint64_t addr;
};

struct io_command {
    uint16_t queue, tag;
    int32_t result;
    uint64_t addr;
};

static void command(struct vm_engine *engine, uint32_t op, uint16_t tag, int32_t result)
{
    struct ublk *ublk = &engine->ublk;
    struct io_uring_sqe *sqe = next_sqe(engine);
    struct io_command payload = {.queue = 0, .tag = tag, .result = result};
    io_uring_prep_rw(IORING_OP_URING_CMD, sqe, ublk->fd, NULL, 0, 0);
    sqe->cmd_op = op;
    if (ublk->mode == VM_UBLK_AUTO_BUF)
        sqe->addr = tag | AUTO_BUF_FALLBACK;
    memcpy(sqe->cmd, &payload, sizeof payload);
    io_uring_sqe_set_data64(sqe, (uint64_t)tag << 2 | 1);
}

static off_t copy_position(uint16_t tag, uint64_t at)
{
    return USER_COPY_BASE + ((uint64_t)tag << USER_COPY_TAG_SHIFT) + at;
}

int ublk_put(struct vm_engine *engine, struct request *request, uint64_t at, const void *data,
             uint64_t length)
{
    const uint8_t *from = data;
    while (length) {
        ssize_t done = pwrite(engine->ublk.fd, from, length, copy_position(request->tag, at));
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return done ? -errno : -EIO;
        from += done;
        at += done;
        length -= done;
    }
    return 0;
}

static int get_data(struct vm_engine *engine, struct request *request)
{
    uint64_t at = 0;
    while (at < request->length) {
        ssize_t done = pread(engine->ublk.fd, request->buf + at, request->length - at,
                             copy_position(request->tag, at));
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return done ? -errno : -EIO;
        at += done;
    }
    return 0;
}

static unsigned buffer_class(uint64_t length)
{
    unsigned class = 0;
    while ((4096ull << class) < length)
        class++;
    return class;
}

static void drop_free_buffers(struct ublk *ublk)
{
    for (unsigned class = 0; class < BUFFER_CLASSES; class++) {
        struct buffer *buffer;
        while ((buffer = ublk->free[class])) {
            ublk->free[class] = buffer->next;
            ublk->buffer_bytes -= 4096ull << class;
            free(buffer);
        }
    }
}

static uint8_t *buffer_get(struct ublk *ublk, uint64_t length)
{
    unsigned class = buffer_class(length);
    uint64_t bytes = 4096ull << class;
    struct buffer *buffer = ublk->free[class];
    void *fresh;
    if (buffer) {
        ublk->free[class] = buffer->next;
        return (uint8_t *)buffer;
    }
    for (int attempt = 0; attempt < 2; attempt++) {
        if (ublk->buffer_bytes + bytes <= MAX_BUFFER_BYTES && !posix_memalign(&fresh, 4096, bytes)) {
            ublk->buffer_bytes += bytes;
            return fresh;
        }
        drop_free_buffers(ublk);
    }
    return NULL;
}

static void buffer_put(struct ublk *ublk, uint8_t *data, uint64_t length)
{
    unsigned class = buffer_class(length);
    struct buffer *buffer = (struct buffer *)data;
    buffer->next = ublk->free[class];
    ublk->free[class] = buffer;
}

bool ublk_prepare(struct vm_engine *engine, struct request *request)
{
    bool data = request->op == VM_OP_READ || request->op == VM_OP_WRITE;
    if (data && request->mover == IN_MEMORY) {
        uint8_t *buf = buffer_get(&engine->ublk, request->length);
        if (!buf && !engine->ublk.buffer_bytes) {
            request_fail(engine, request, -ENOMEM);  // none is in use, so none will come back
            return false;
        }
        if (!buf) {
            request_park(engine, request, WAIT_BUFFER, 0);
            return false;
        }
        request->buf = buf;
        if (request->op == VM_OP_WRITE)
            request->error = get_data(engine, request);
    }
    request->prepared = true;
    return true;
}

void ublk_complete(struct vm_engine *engine, struct request *request)
{
    bool data = request->op == VM_OP_READ || request->op == VM_OP_WRITE;
    int error = request->error;
    if (request->buf) {
        if (request->op == VM_OP_READ && !error)
            error = ublk_put(engine, request, 0, request->buf, request->length);
        buffer_put(&engine->ublk, request->buf, request->length);
        request->buf = NULL;
        requests_wake(engine, WAIT_BUFFER, 0, 0);
    }
    if (error == -ESHUTDOWN)
        error = -EIO;
    command(engine, COMMIT_AND_FETCH_REQ, request->tag, error ? error : data ? (int)request->length : 0);
}

static void start(struct vm_engine *engine, uint16_t tag)
{
    struct ublk *ublk = &engine->ublk;
    struct descriptor descriptor = ((const struct descriptor *)ublk->descriptors)[tag];
    struct request *request = &ublk->requests[tag];
    uint32_t flags = descriptor.op_flags;
    bool kernel = ublk->mode == VM_UBLK_AUTO_BUF && !(flags & OP_NEED_REG_BUF);
    *request = (struct request){.op = flags & 0xff,
                                .origin = FROM_UBLK,
                                .mover = kernel ? IN_KERNEL : IN_MEMORY,
                                .fua = flags & OP_FUA,
                                .nounmap = flags & OP_NOUNMAP,
                                .tag = tag,
                                .offset = descriptor.start << 9,
                                .length = (uint64_t)descriptor.sectors << 9};
    if (request->op == VM_OP_FLUSH)
        request->offset = request->length = 0;
    if (request->op <= VM_OP_WRITE && request->length > ublk->max_io)
        command(engine, COMMIT_AND_FETCH_REQ, tag, -EINVAL);  // no buffer is that long
    else
        request_start(engine, request);
}

void ublk_cqe(struct vm_engine *engine, uint16_t tag, int result)
{
    struct ublk *ublk = &engine->ublk;
    if (result == 0) {
        start(engine, tag);
        return;
    }
    // ABORT, or a command that the kernel will not take: the tag is not served any more.
    if (result != RESULT_ABORT)
        fault_tell(engine, VM_FAULT_FAILED, 0, 0, (uint64_t)-(int64_t)result);
    ublk->stopping = true;
    if (++ublk->aborted < ublk->depth)
        return;
    if (ublk->mode == VM_UBLK_AUTO_BUF)
        io_uring_unregister_buffers(&engine->ring);  // room for those of the next device
    ublk_close(engine);
    fault_tell(engine, VM_FAULT_DEVICE, 0, 0, 0);
}

int ublk_serve(struct vm_engine *engine, int fd, uint32_t depth, uint32_t max_io, uint32_t mode)
{
    struct ublk *ublk = &engine->ublk;
    long page = sysconf(_SC_PAGESIZE);
    if (ublk->serving)
        return -EBUSY;
    if (!depth || depth > 4096 || max_io > MAX_IO)
        return -EINVAL;
    *ublk = (struct ublk){.fd = fd, .depth = depth, .max_io = max_io, .mode = mode};
    ublk->descriptors_size = (depth * sizeof(struct descriptor) + page - 1) / page * page;
    ublk->descriptors = mmap(NULL, ublk->descriptors_size, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (ublk->descriptors == MAP_FAILED)
        return -errno;
    // A forked child that kept the mapping would keep the device from being deleted.
    madvise((void *)ublk->descriptors, ublk->descriptors_size, MADV_DONTFORK);
    ublk->requests = calloc(depth, sizeof *ublk->requests);
    int error = ublk->requests ? 0 : -ENOMEM;
    if (!error && mode == VM_UBLK_AUTO_BUF)
        error = io_uring_register_buffers_sparse(&engine->ring, depth);
    if (error < 0) {
        munmap((void *)ublk->descriptors, ublk->descriptors_size);
        free(ublk->requests);
        *ublk = (struct ublk){.fd = -1};
        return error;
    }
    // Memory that this thread needs must not be found by writing to the disk that it serves.
    prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
    ublk->serving = true;
    for (uint32_t tag = 0; tag < depth; tag++)
        command(engine, FETCH_REQ, tag, 0);
    // What cannot be submitted now the loop will submit, and START_DEV waits for it.  It is no error:
    // the descriptor is ours by now.
    io_uring_submit(&engine->ring);
    return 0;
}

void ublk_close(struct vm_engine *engine)
{
    struct ublk *ublk = &engine->ublk;
    if (!ublk->serving)
        return;
    drop_free_buffers(ublk);
    munmap((void *)ublk->descriptors, ublk->descriptors_size);
    close(ublk->fd);
    free(ublk->requests);
    *ublk = (struct ublk){.fd = -1};
}

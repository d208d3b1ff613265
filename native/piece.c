/* Pieces: single host requests, through the ring.  A short result is continued, never passed on. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

struct io_uring_sqe *next_sqe(struct vm_engine *engine)
{
    struct io_uring_sqe *sqe;
    while (!(sqe = io_uring_get_sqe(&engine->ring))) {
        int submitted = io_uring_submit(&engine->ring);
        if (submitted < 0 && submitted != -EINTR && submitted != -EAGAIN && submitted != -EBUSY)
            abort();  // the ring is gone: nothing that was acknowledged is touched by dying
    }
    return sqe;
}

struct piece *piece_new(struct vm_engine *engine, uint8_t op)
{
    struct piece *piece = engine->free_pieces;
    if (piece)
        engine->free_pieces = piece->next;
    else if (!(piece = malloc(sizeof *piece)))
        abort();
    *piece = (struct piece){.op = op};
    return piece;
}

// Into a buffer of its own: the request's bytes are somebody else's to read.
static void encrypt(struct vm_engine *engine, struct piece *piece)
{
    const struct cipher *cipher = engine->files[piece->file].cipher;
    void *encrypted;
    if (posix_memalign(&encrypted, 4096, piece->length)) {
        piece->error = -ENOMEM;
        return;
    }
    piece->error = cipher_run(cipher, true, piece->host, piece->guest, piece->buf, piece->length,
                              encrypted);
    piece->buf = piece->encrypted = encrypted;
}

static void enter(struct vm_engine *engine, struct piece *piece)
{
    struct io_uring_sqe *sqe = next_sqe(engine);
    if (piece->error) {
        io_uring_prep_nop(sqe);
        io_uring_sqe_set_data64(sqe, (uintptr_t)piece);
        return;
    }
    struct file *file = &engine->files[piece->file];
    uint64_t bits = piece->host | piece->length
                    | (piece->mover == IN_MEMORY ? (uintptr_t)piece->buf : 0);
    piece->direct = file->direct_fd >= 0 && !(bits & (file->align - 1)) && !piece->refused;
    int fd = piece->direct ? file->direct_fd : file->fd;
    bool kernel = piece->mover == IN_KERNEL;
    switch (piece->op) {
    case PIECE_READ:
        io_uring_prep_read(sqe, fd, piece->buf, piece->length, piece->host);
        sqe->opcode = kernel ? IORING_OP_READ_FIXED : IORING_OP_READ;
        break;
    case PIECE_WRITE:
        io_uring_prep_write(sqe, fd, piece->buf, piece->length, piece->host);
        sqe->opcode = kernel ? IORING_OP_WRITE_FIXED : IORING_OP_WRITE;
        break;
    case PIECE_ZERO:
        io_uring_prep_read(sqe, engine->zero_fd, piece->buf, piece->length, 0);
        sqe->opcode = IORING_OP_READ_FIXED;
        break;
    case PIECE_SYNC:
        io_uring_prep_fsync(sqe, file->sync_fd >= 0 ? file->sync_fd : file->fd,
                            IORING_FSYNC_DATASYNC);
        break;
    }
    if (kernel)
        sqe->buf_index = piece->tag;
    io_uring_sqe_set_data64(sqe, (uintptr_t)piece);
}

void piece_submit(struct vm_engine *engine, struct piece *piece)
{
    if (piece->op == PIECE_WRITE && engine->files[piece->file].cipher)
        encrypt(engine, piece);
    piece->epoch = engine->epoch;
    engine->flying[piece->epoch]++;
    engine->stats.host_reads += piece->op == PIECE_READ;
    engine->stats.host_writes += piece->op == PIECE_WRITE;
    engine->stats.host_syncs += piece->op == PIECE_SYNC;
    enter(engine, piece);
}

static void move_on(struct piece *piece, uint32_t length)
{
    piece->host += length;
    piece->buf += length;
    piece->length -= length;
    piece->done += length;
}

// Returns true when the piece is over.
static bool advance(struct vm_engine *engine, struct piece *piece, int *result)
{
    if (piece->error) {
        *result = piece->error;
        return true;
    }
    if (*result == -EINTR || *result == -EAGAIN) {
        enter(engine, piece);
        return false;
    }
    if (*result == -EINVAL && piece->direct) {
        // How the memory of a guest's request lies is seen by the host alone.
        piece->refused = true;
        enter(engine, piece);
        return false;
    }
    if (*result < 0 || piece->op == PIECE_SYNC)
        return true;
    if ((uint32_t)*result < piece->length) {
        if (*result == 0 && piece->op == PIECE_READ) {
            // Past the end of the file: a last cluster may be short, and reads as zeros.
            if (piece->mover == IN_MEMORY) {
                memset(piece->buf, 0, piece->length);
                move_on(piece, piece->length);
                return true;
            }
            piece->op = PIECE_ZERO;
        } else if (*result == 0) {
            *result = -EIO;
            return true;
        }
        move_on(piece, *result);
        enter(engine, piece);
        return false;
    }
    move_on(piece, piece->length);
    return true;
}

// A whole read; buf and host stand at its end.
static int decrypt(struct vm_engine *engine, struct piece *piece)
{
    uint8_t *start = piece->buf - piece->done;
    return cipher_run(engine->files[piece->file].cipher, false, piece->host - piece->done,
                      piece->guest, start, piece->done, start);
}

void piece_done(struct vm_engine *engine, struct piece *piece, int result)
{
    if (!advance(engine, piece, &result))
        return;
    int error = result < 0 ? result : 0;
    free(piece->encrypted);
    if (!error && piece->op == PIECE_READ && engine->files[piece->file].cipher)
        error = decrypt(engine, piece);
    struct request *request = piece->request;
    struct alloc *alloc = piece->alloc;
    struct copy *copy = piece->copy;
    if (error && (piece->op == PIECE_WRITE || piece->op == PIECE_SYNC))
        fault_tell(engine, VM_FAULT_FAILED, request ? request->offset : copy ? copy->base : 0, 0,
                   (uint64_t)-(int64_t)error);
    engine->flying[piece->epoch]--;
    bool sync = piece->op == PIECE_SYNC;
    piece->next = engine->free_pieces;
    engine->free_pieces = piece;
    if (sync) {
        sync_piece_done(engine, error);
        return;
    }
    if (copy) {
        copy_write_done(engine, copy, error);
        return;
    }
    if (alloc)
        alloc_part_done(engine, alloc, error);
    request_piece_done(engine, request, error);
}

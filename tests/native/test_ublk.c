/* ublk.c against a stand-in for the kernel: each command is a read from a pipe of its tag, which ends
 * when the test has a request for it or stops the device.  Registered buffers are the kernel's own
 * matter; what is tried of them here is the way around.  The real driver: tests/device. */
#include "harness.h"

#include <semaphore.h>

#include "internal.h"

enum { CDEV = 1 << 20 };  // never the number of an open file

static void *fake_mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset);
static int fake_munmap(void *at, size_t length);
static ssize_t fake_pread(int fd, void *data, size_t length, off_t position);
static ssize_t fake_pwrite(int fd, const void *data, size_t length, off_t position);
static int fake_close(int fd);
static int fake_memalign(void **ret, size_t alignment, size_t length);
static int fake_submit(struct io_uring *ring);
static void fake_command(struct io_uring_sqe *sqe, uint64_t user_data);
#define mmap fake_mmap
#define munmap fake_munmap
#define madvise(at, length, advice) ((void)0)
#define pread fake_pread
#define pwrite fake_pwrite
#define close fake_close
#define posix_memalign fake_memalign
#define io_uring_submit fake_submit
#define io_uring_sqe_set_data64 fake_command
#define ublk_cqe real_ublk_cqe
#include "ublk.c"
#undef mmap
#undef munmap
#undef pread
#undef pwrite
#undef close
#undef posix_memalign
#undef io_uring_submit
#undef io_uring_sqe_set_data64
#undef ublk_cqe

enum { DEPTH = 64, MAX_REQUEST = MIB, DISK = 64 * MIB };
enum { UNIT = 4 * KIB, CLUSTER = 64 * KIB, LEAF_UNITS = 256 };
enum { READY = 'r', ABORT = 'a', REFUSED = 'x' };

/* The driver's side of a tag */
static struct slot {
    int ours, theirs;
    char byte;
    bool served;            /* the request is with the engine */
    sem_t answered;
    int result;
    uint8_t *data;
    uint64_t length;
    uint32_t op;
} slots[DEPTH];
static struct descriptor descriptors[DEPTH];
static int depth, mapped, closed, fetches, told;
static int fail_data, fail_memory, fail_submit, fail_mmap;

static void *fake_mmap(void *at, size_t length, int protection, int flags, int fd, off_t offset)
{
    assert(!at && length >= depth * sizeof(struct descriptor) && protection == PROT_READ);
    assert(flags & MAP_SHARED && fd == CDEV && offset == 0);
    if (fail_mmap) {
        errno = fail_mmap;
        return MAP_FAILED;
    }
    mapped++;
    return descriptors;
}

static int fake_munmap(void *at, size_t length)
{
    assert(at == descriptors && length >= depth * sizeof(struct descriptor) && mapped == 1);
    mapped--;
    return 0;
}

static int fake_close(int fd)
{
    assert(fd == CDEV && !mapped);
    closed++;
    return 0;
}

static int fake_memalign(void **ret, size_t alignment, size_t length)
{
    if (fail_memory)
        return ENOMEM;
    return posix_memalign(ret, alignment, length);
}

static int fake_submit(struct io_uring *ring)
{
    if (fail_submit)
        return fail_submit;
    return io_uring_submit(ring);
}

static uint8_t *user_copy(int fd, uint32_t op, size_t *length, off_t position)
{
    uint64_t within = position - 0x80000000ull;
    uint64_t tag = within >> 25, at = within & ((1 << 25) - 1);
    assert(fd == CDEV && tag < (uint64_t)depth && slots[tag].served && slots[tag].op == op);
    assert(at + *length <= slots[tag].length);
    if (*length > 64 * KIB)
        *length = 64 * KIB;  // the caller has to go on
    return slots[tag].data + at;
}

static ssize_t fake_pread(int fd, void *data, size_t length, off_t position)
{
    uint8_t *from = user_copy(fd, VM_OP_WRITE, &length, position);
    if (fail_data) {
        errno = fail_data;
        return -1;
    }
    memcpy(data, from, length);
    return length;
}

static ssize_t fake_pwrite(int fd, const void *data, size_t length, off_t position)
{
    uint8_t *to = user_copy(fd, VM_OP_READ, &length, position);
    if (fail_data) {
        errno = fail_data;
        return -1;
    }
    memcpy(to, data, length);
    return length;
}

static void fake_command(struct io_uring_sqe *sqe, uint64_t user_data)
{
    struct io_command payload;
    memcpy(&payload, sqe->cmd, sizeof payload);
    struct slot *slot = &slots[payload.tag];
    uint32_t op = sqe->cmd_op;
    assert(sqe->opcode == IORING_OP_URING_CMD && sqe->fd == CDEV && payload.queue == 0);
    assert(payload.tag < depth && user_data == ((uint64_t)payload.tag << 2 | 1));
    assert(sqe->addr == (engine->ublk.mode == VM_UBLK_AUTO_BUF ? payload.tag | 1u << 16 : 0));
    io_uring_prep_read(sqe, slot->theirs, &slot->byte, 1, 0);
    memset(sqe->cmd, 0, 16);
    io_uring_sqe_set_data64(sqe, user_data);
    if (op == 0xc0107520u) {
        fetches++;
        return;
    }
    assert(op == 0xc0107521u && slot->served);
    slot->served = false;
    slot->result = payload.result;
    sem_post(&slot->answered);
}

void ublk_cqe(struct vm_engine *engine, uint16_t tag, int result)
{
    assert(result == 1 && __atomic_load_n(&told, __ATOMIC_ACQUIRE));
    switch (slots[tag].byte) {
    case READY:
        slots[tag].served = true;
        real_ublk_cqe(engine, tag, 0);
        break;
    case ABORT:
        real_ublk_cqe(engine, tag, -ENODEV);
        break;
    default:
        real_ublk_cqe(engine, tag, -EINVAL);
    }
}

static void tell(int tag, char what)
{
    __atomic_fetch_add(&told, 1, __ATOMIC_RELEASE);  // ThreadSanitizer does not see the pipe
    assert(write(slots[tag].ours, &what, 1) == 1);
}

/* Give a request to the engine, and its result. */
static void give(int tag, uint32_t op_flags, uint64_t offset, uint64_t length, void *data)
{
    struct slot *slot = &slots[tag];
    slot->op = op_flags & 0xff;
    slot->data = data;
    slot->length = length;
    descriptors[tag] = (struct descriptor){op_flags, length >> 9, offset >> 9, 0};
    tell(tag, READY);
}

static int answer_of(int tag)
{
    while (sem_wait(&slots[tag].answered) && errno == EINTR)
        ;
    return slots[tag].result;
}

static int ask(int tag, uint32_t op_flags, uint64_t offset, uint64_t length, void *data)
{
    give(tag, op_flags, offset, length, data);
    return answer_of(tag);
}

static uint8_t *buffers;  /* one of the largest size for each tag */

static void set_up(uint32_t flags)
{
    struct vm_config config = {.size = DISK, .sector_size = 512, .unit_shift = 12,
                               .cluster_shift = 16, .leaf_units = LEAF_UNITS, .flags = flags};
    create(&config);
    add_file(temporary(), true);
    assert(ftruncate(files[0], DISK) == 0);
    buffers = malloc((size_t)DEPTH * MAX_REQUEST);
    for (int i = 0; i < DEPTH; i++) {
        pipe_of(&slots[i].ours, &slots[i].theirs, true);
        sem_init(&slots[i].answered, 0, 0);
        slots[i].served = false;
    }
    closed = mapped = fetches = 0;
    start_loop();
}

static uint8_t *buffer_of(int tag) { return buffers + (size_t)tag * MAX_REQUEST; }

static void serve(int count, uint32_t mode)
{
    depth = count;
    int before = fetches;
    assert(vm_ublk_serve(engine, CDEV, depth, MAX_REQUEST, mode) == 0);
    assert(fetches == before + depth);
}

/* As STOP_DEV does: what is being served has been answered, then every command is aborted. */
static void stop_device(void)
{
    int before = closed;
    for (int i = 0; i < depth; i++)
        tell(i, ABORT);
    expect(VM_FAULT_DEVICE);
    assert(closed == before + 1 && !mapped);
}

static void tear_down(void)
{
    finish_all();
    assert(closed && !mapped);
    for (int i = 0; i < DEPTH; i++) {
        close(slots[i].ours);
        close(slots[i].theirs);
        sem_destroy(&slots[i].answered);
    }
    free(buffers);
}

static void begun(void)
{
    give(0, VM_OP_WRITE, 0, 512, buffer_of(0));
    begin();
    assert(answer_of(0) == 512);
}

static void test_results(void)
{
    set_up(VM_FLAT | VM_CAN_ZERO | VM_CAN_DISCARD);
    serve(4, VM_UBLK_USER_COPY);
    begun();
    memset(buffer_of(0), 0x5a, MIB);
    assert(ask(1, VM_OP_WRITE, MIB, MIB, buffer_of(0)) == MIB);
    assert(ask(1, VM_OP_WRITE, 5 * MIB - 512, 1536, buffer_of(0)) == 1536);
    assert(ask(2, VM_OP_READ, MIB - 512, MIB, buffer_of(1)) == MIB);
    assert(all_bytes(buffer_of(1), 512, 0) && all_bytes(buffer_of(1) + 512, MIB - 512, 0x5a));
    assert(ask(3, VM_OP_READ, 5 * MIB - 1024, 4096, buffer_of(1)) == 4096);
    assert(all_bytes(buffer_of(1), 512, 0) && all_bytes(buffer_of(1) + 512, 1536, 0x5a));
    assert(ask(0, VM_OP_FLUSH, 0, 0, NULL) == 0);
    assert(ask(0, VM_OP_FLUSH, 1ull << 60, 4096, NULL) == 0);  // it has no place
    give(0, VM_OP_DISCARD, MIB, 512 * KIB, NULL);
    struct vm_fault fault = expect(VM_FAULT_DISCARD);
    assert(fault.offset == MIB && fault.length == 512 * KIB);
    vm_answer(engine, fault.id, 0);
    assert(answer_of(0) == 0);
    give(0, VM_OP_WRITE_ZEROES, MIB, 512 * KIB, NULL);
    fault = expect(VM_FAULT_ZERO);
    vm_answer(engine, fault.id, -ENOSPC);
    assert(answer_of(0) == -ENOSPC);
    assert(ask(0, VM_OP_WRITE_ZEROES | 1u << 15, MIB + 512, 3 * CLUSTER, NULL) == 0);  // no unmap
    expect_none();
    assert(ask(0, VM_OP_READ, MIB, 256 * KIB, buffer_of(1)) == 256 * KIB);
    assert(all_bytes(buffer_of(1), 512, 0x5a));
    assert(all_bytes(buffer_of(1) + 512, 3 * CLUSTER, 0));
    assert(all_bytes(buffer_of(1) + 512 + 3 * CLUSTER, CLUSTER - 512, 0x5a));
    uint64_t syncs = stats().host_syncs;
    assert(ask(0, VM_OP_WRITE | 1u << 13, 0, 512, buffer_of(0)) == 512);  // FUA
    assert(stats().host_syncs == syncs + 1);
    assert(ask(0, VM_OP_READ, DISK, 512, buffer_of(0)) == -EINVAL);
    assert(ask(0, VM_OP_READ, DISK - 512, 1024, buffer_of(0)) == -EINVAL);
    assert(ask(0, 4, 0, 512, NULL) == -EOPNOTSUPP);
    assert(ask(0, 12, 0, 512, NULL) == -EOPNOTSUPP);
    assert(ask(0, VM_OP_READ, 0, 2 * MIB, NULL) == -EINVAL);  // more than was agreed on
    vm_set_failed(engine, -EDQUOT);
    assert(stats().failed == -EDQUOT);
    assert(ask(0, VM_OP_WRITE, 0, 512, buffer_of(0)) == -EDQUOT);
    assert(ask(0, VM_OP_FLUSH, 0, 0, NULL) == -EDQUOT);
    assert(ask(0, VM_OP_READ, 0, 512, buffer_of(0)) == 512);
    stop_device();
    tear_down();
}

static void test_read_only(void)
{
    set_up(VM_FLAT | VM_READ_ONLY);
    serve(1, VM_UBLK_USER_COPY);
    assert(ask(0, VM_OP_READ, 0, 4096, buffer_of(0)) == 4096);
    assert(ask(0, VM_OP_WRITE, 0, 4096, buffer_of(0)) == -EROFS);
    assert(ask(0, VM_OP_DISCARD, 0, MIB, NULL) == -EROFS);
    assert(ask(0, VM_OP_WRITE_ZEROES, 0, MIB, NULL) == -EROFS);
    assert(ask(0, VM_OP_FLUSH, 0, 0, NULL) == 0);
    stop_device();
    tear_down();
}

static void test_data_that_cannot_be_copied_fails_its_request(void)
{
    set_up(VM_FLAT);
    serve(2, VM_UBLK_USER_COPY);
    begun();
    fail_data = EFAULT;
    assert(ask(0, VM_OP_WRITE, 0, 4096, buffer_of(0)) == -EFAULT);
    assert(ask(1, VM_OP_READ, 0, 4096, buffer_of(1)) == -EFAULT);
    fail_data = 0;
    assert(ask(0, VM_OP_WRITE, 0, 4096, buffer_of(0)) == 4096);
    assert(stats().host_writes == 2);
    stop_device();
    tear_down();
}

/* Where the kernel could not register a buffer, and for pieces that are made here. */
static void test_around_registered_buffers(void)
{
    uint8_t data[CLUSTER];
    set_up(VM_CAN_ZERO | VM_CAN_DISCARD);
    serve(DEPTH, VM_UBLK_AUTO_BUF);
    give(0, VM_OP_WRITE | 1u << 17, 0, 4 * KIB, memset(buffer_of(0), 0x5a, MIB));
    begin();
    struct vm_fault fault = expect(VM_FAULT_FILL);
    fill_alike(&fault, LEAF_UNITS, UNIT, VM_DATA, 0);
    assert(answer_of(0) == 4 * KIB);
    assert(ask(1, VM_OP_READ | 1u << 17, 0, 8 * KIB, buffer_of(1)) == 8 * KIB);
    assert(all_bytes(buffer_of(1), 4 * KIB, 0x5a) && all_bytes(buffer_of(1) + 4 * KIB, 4 * KIB, 0));
    give(2, VM_OP_READ, MIB + 512, 2 * CLUSTER, buffer_of(2));
    fault = expect(VM_FAULT_FILL);
    fill_alike(&fault, LEAF_UNITS, UNIT, VM_COMPRESSED, 0);
    for (int i = 0; i < 3; i++) {
        fault = expect(VM_FAULT_INFLATE);
        memset(data, i + 1, sizeof data);
        vm_inflated(engine, fault.id, MIB + i * CLUSTER, data, CLUSTER, 0);
    }
    assert(answer_of(2) == 2 * CLUSTER);
    assert(all_bytes(buffer_of(2), CLUSTER - 512, 1));
    assert(all_bytes(buffer_of(2) + CLUSTER - 512, CLUSTER, 2));
    assert(all_bytes(buffer_of(2) + 2 * CLUSTER - 512, 512, 3));
    assert(ask(3, VM_OP_FLUSH, 0, 0, NULL) == 0);
    assert(ask(3, VM_OP_WRITE_ZEROES | 1u << 15, 0, 64 * KIB, NULL) == 0);
    assert(ask(1, VM_OP_READ | 1u << 17, 0, 8 * KIB, buffer_of(1)) == 8 * KIB);
    assert(all_bytes(buffer_of(1), 8 * KIB, 0));
    fail_data = EIO;
    assert(ask(2, VM_OP_READ, MIB, 512, buffer_of(2)) == -EIO);
    fail_data = 0;
    stop_device();
    serve(DEPTH, VM_UBLK_AUTO_BUF);  // another device, on the same ring
    assert(ask(1, VM_OP_READ | 1u << 17, 0, 8 * KIB, buffer_of(1)) == 8 * KIB);
    stop_device();
    tear_down();
}

/* Requests of more memory than there may be wait for each other, and all have their turn. */
static void test_buffers_are_bounded(void)
{
    set_up(VM_FLAT);
    serve(DEPTH, VM_UBLK_USER_COPY);
    begun();
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < DEPTH; i++) {
            uint64_t length = (i + round) % 4 ? MIB : (i % 16 + 1) * 512;
            memset(buffer_of(i), round * 7 + i, MIB);
            give(i, VM_OP_WRITE, (uint64_t)i * MIB, length, buffer_of(i));
        }
        for (int i = 0; i < DEPTH; i++)
            assert(answer_of(i) == (int)slots[i].length);
        for (int i = 0; i < DEPTH; i++)
            give(i, VM_OP_READ, (uint64_t)i * MIB, slots[i].length, memset(buffer_of(i), 0, MIB));
        for (int i = 0; i < DEPTH; i++) {
            assert(answer_of(i) == (int)slots[i].length);
            assert(all_bytes(buffer_of(i), slots[i].length, round * 7 + i));
        }
    }
    assert(engine->ublk.buffer_bytes <= 32 * MIB);
    stop_device();
    tear_down();
}

static void test_no_memory_at_all_is_an_error(void)
{
    set_up(VM_FLAT);
    serve(2, VM_UBLK_USER_COPY);
    fail_memory = 1;
    assert(ask(0, VM_OP_READ, 0, MIB, buffer_of(0)) == -ENOMEM);
    fail_memory = 0;
    assert(ask(0, VM_OP_READ, 0, MIB, buffer_of(0)) == MIB);
    fail_memory = 1;
    assert(ask(0, VM_OP_READ, 0, MIB, buffer_of(0)) == MIB);  // there is one
    assert(ask(0, VM_OP_READ, 0, 4096, buffer_of(0)) == -ENOMEM);
    fail_memory = 0;
    stop_device();
    tear_down();
}

static void test_what_cannot_be_served(void)
{
    set_up(VM_FLAT);
    depth = 1;
    assert(vm_ublk_serve(engine, CDEV, 0, MIB, VM_UBLK_USER_COPY) == -EINVAL);
    assert(vm_ublk_serve(engine, CDEV, 4097, MIB, VM_UBLK_USER_COPY) == -EINVAL);
    assert(vm_ublk_serve(engine, CDEV, 1, 2 * MIB, VM_UBLK_USER_COPY) == -EINVAL);
    fail_mmap = EPERM;
    assert(vm_ublk_serve(engine, CDEV, 1, MIB, VM_UBLK_USER_COPY) == -EPERM);
    fail_mmap = 0;
    assert(closed == 0);  // the descriptor is still the caller's
    fail_submit = -EAGAIN;
    serve(1, VM_UBLK_USER_COPY);  // the loop submits again
    fail_submit = 0;
    assert(vm_ublk_serve(engine, CDEV, 1, MIB, VM_UBLK_USER_COPY) == -EBUSY);
    assert(ask(0, VM_OP_READ, 0, 4096, buffer_of(0)) == 4096);
    stop_device();
    tear_down();
}

/* Tags that are aborted, or that the kernel will not take, while others are served. */
static void test_the_device_is_closed_after_the_last_tag(void)
{
    set_up(VM_FLAT);
    serve(4, VM_UBLK_USER_COPY);
    give(0, VM_OP_WRITE, 0, 4096, buffer_of(0));
    struct vm_fault fault = expect(VM_FAULT_BEGIN);
    tell(1, ABORT);
    tell(2, REFUSED);
    tell(3, ABORT);
    struct vm_fault refused = expect(VM_FAULT_FAILED);
    assert(refused.arg == EINVAL);
    expect_none();
    assert(closed == 0);
    vm_answer(engine, fault.id, 0);
    assert(answer_of(0) == 4096);
    expect_none();
    tell(0, ABORT);
    expect(VM_FAULT_DEVICE);
    assert(closed == 1 && vm_io(engine, VM_OP_READ, 0, 4096, buffer_of(0), 0) == 0);
    tear_down();
    assert(closed == 1);
}

static bool enough;

static void *load(void *argument)
{
    int tag = (int)(uintptr_t)argument;
    static const uint32_t ops[] = {VM_OP_READ, VM_OP_WRITE, VM_OP_FLUSH, VM_OP_WRITE};
    int result = 0;
    for (uint64_t i = 0; !__atomic_load_n(&enough, __ATOMIC_RELAXED) && result >= 0; i++) {
        uint64_t length = (i * 37 + tag) % 2048 * 512 + 512;
        result = ask(tag, ops[i % 4], (i * 71 + tag * 13) % (DISK / MIB - 1) * MIB, length,
                     buffer_of(tag));
    }
    assert(result >= 0 || result == -EIO);
    return NULL;
}

static void test_stop_under_load(bool device_first)
{
    pthread_t threads[16];
    set_up(VM_FLAT);
    memset(buffers, 1, (size_t)DEPTH * MAX_REQUEST);
    serve(16, VM_UBLK_USER_COPY);
    begun();
    enough = false;
    for (uintptr_t i = 0; i < 16; i++)
        pthread_create(&threads[i], NULL, load, (void *)i);
    while (stats().reads < 200)
        sched_yield();
    if (device_first) {
        __atomic_store_n(&enough, true, __ATOMIC_RELAXED);
        for (int i = 0; i < 16; i++)
            pthread_join(threads[i], NULL);
        stop_device();
    }
    vm_engine_stop(engine);
    join_loop();
    assert(closed == 1 && !mapped);
    __atomic_store_n(&enough, true, __ATOMIC_RELAXED);
    for (int i = 0; i < 16 && !device_first; i++) {
        sem_post(&slots[i].answered);  // who asks now is told by the kernel: nobody is there
        pthread_join(threads[i], NULL);
    }
    tear_down();
}

int main(void)
{
    test_results();
    test_read_only();
    test_data_that_cannot_be_copied_fails_its_request();
    test_around_registered_buffers();
    test_buffers_are_bounded();
    test_no_memory_at_all_is_an_error();
    test_what_cannot_be_served();
    test_the_device_is_closed_after_the_last_tag();
    test_stop_under_load(true);
    test_stop_under_load(false);
    return 0;
}

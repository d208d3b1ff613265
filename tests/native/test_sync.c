/* Flushes, and writes that have to be durable, with a host whose fdatasync ends when and how the
 * test wants: each reads a byte from a pipe of its own. */
#include "harness.h"

#include "internal.h"

static void fake_fsync(struct io_uring_sqe *sqe, struct piece *piece, int fd);
#define io_uring_prep_fsync(sqe, fd, flags) fake_fsync(sqe, piece, fd)
#define piece_done real_piece_done
#include "piece.c"
#undef piece_done

enum { SYNCS = 64, UNIT = 4 * KIB, CLUSTER = 64 * KIB, LEAF_UNITS = 256, DISK = 4 * MIB };
enum { GOOD = 'g', BAD = 'b' };

static struct sync {
    struct piece *piece;
    int ours, theirs, fd;
    char byte;
} syncs[SYNCS];
static int sync_count;

static void fake_fsync(struct io_uring_sqe *sqe, struct piece *piece, int fd)
{
    int number = __atomic_load_n(&sync_count, __ATOMIC_RELAXED);
    assert(number < SYNCS);
    struct sync *sync = &syncs[number];
    sync->piece = piece;
    sync->fd = fd;
    io_uring_prep_read(sqe, sync->theirs, &sync->byte, 1, 0);
    __atomic_store_n(&sync_count, number + 1, __ATOMIC_RELEASE);
}

void piece_done(struct vm_engine *engine, struct piece *piece, int result)
{
    for (int i = 0; piece->op == PIECE_SYNC && i < sync_count; i++) {
        if (syncs[i].piece != piece)
            continue;
        syncs[i].piece = NULL;
        result = syncs[i].byte == GOOD ? 0 : -EIO;
        break;
    }
    real_piece_done(engine, piece, result);
}

static int started(void)
{
    settle();
    return __atomic_load_n(&sync_count, __ATOMIC_ACQUIRE);
}

static void until_started(int count)
{
    while (started() < count)
        sched_yield();
}

static void end_sync(int number, char how)
{
    until_started(number + 1);
    assert(write(syncs[number].ours, &how, 1) == 1);
}

static uint8_t buffer[MIB];

static void set_up(uint32_t flags)
{
    struct vm_config config = {.size = DISK, .sector_size = 512, .unit_shift = 12,
                               .cluster_shift = 16, .leaf_units = LEAF_UNITS,
                               .flags = VM_CAN_ZERO | VM_CAN_DISCARD | flags};
    create(&config);
    add_file(temporary(), true);
    sync_count = 0;
    for (int i = 0; i < SYNCS; i++)
        pipe_of(&syncs[i].ours, &syncs[i].theirs, true);
    memset(buffer, 0x5a, sizeof buffer);
    start_loop();
}

/* The first write of the session, acknowledged; the leaf's clusters are DATA. */
static void write_one(void)
{
    struct job *job = issue(VM_OP_WRITE, 0, 4 * KIB, buffer, 0);
    begin();
    struct vm_fault fault = expect(VM_FAULT_FILL);
    fill_alike(&fault, LEAF_UNITS, UNIT, VM_DATA, 0);
    assert(result_of(job) == 0);
}

static void tear_down(void)
{
    finish_all();
    for (int i = 0; i < SYNCS; i++) {
        close(syncs[i].ours);
        close(syncs[i].theirs);
    }
}

/* The kernel reports a failed write-back once per open file: the next fdatasync succeeds. */
static void test_no_flush_succeeds_once_a_sync_has_failed(void)
{
    set_up(0);
    write_one();
    struct job *first = issue(VM_OP_FLUSH, 0, 0, NULL, 0);
    until_started(1);
    struct job *others[2] = {issue(VM_OP_FLUSH, 0, 0, NULL, 0),
                             issue(VM_OP_WRITE, 0, KIB, buffer, VM_IO_FUA)};
    until_in_flight(3);
    end_sync(0, BAD);
    assert(result_of(first) == -EIO);
    for (int i = 1; i < started(); i++)
        end_sync(i, GOOD);
    assert(result_of(others[0]) == -EIO && result_of(others[1]) == -EIO);
    struct vm_fault fault = expect(VM_FAULT_FAILED);
    assert(fault.arg == EIO);
    assert(vm_io(engine, VM_OP_FLUSH, 0, 0, NULL, 0) == -EIO);
    assert(vm_io(engine, VM_OP_WRITE, 0, KIB, buffer, 0) == -EIO);
    assert(vm_io(engine, VM_OP_DISCARD, 0, MIB, buffer, 0) == -EIO);
    assert(vm_io(engine, VM_OP_READ, 0, KIB, buffer, 0) == 0);
    assert(stats().failed == -EIO);
    tear_down();
}

static void test_a_flush_is_not_served_by_a_sync_that_began_before_its_write(void)
{
    set_up(0);
    write_one();
    struct job *first = issue(VM_OP_FLUSH, 0, 0, NULL, 0);
    until_started(1);
    assert(vm_io(engine, VM_OP_WRITE, 0, KIB, buffer, 0) == 0);
    struct job *second = issue(VM_OP_FLUSH, 0, 0, NULL, 0);
    until_in_flight(2);
    end_sync(0, GOOD);
    assert(result_of(first) == 0);
    until_started(2);
    assert(stats().in_flight == 1);
    end_sync(1, GOOD);
    assert(result_of(second) == 0);
    tear_down();
}

static void test_flushes_that_wait_share_the_next_sync(void)
{
    struct job *waiting[8];
    set_up(0);
    write_one();
    struct job *first = issue(VM_OP_FLUSH, 0, 0, NULL, 0);
    until_started(1);
    for (int i = 0; i < 8; i++)
        waiting[i] = issue(VM_OP_FLUSH, 0, 0, NULL, 0);
    until_in_flight(9);
    assert(started() == 1);  // one at a time
    end_sync(0, GOOD);
    assert(result_of(first) == 0);
    end_sync(1, GOOD);
    for (int i = 0; i < 8; i++)
        assert(result_of(waiting[i]) == 0);
    assert(started() == 2);
    tear_down();
}

static void test_durable_writes_wait_for_their_sync(uint32_t flags, uint32_t io_flags)
{
    set_up(flags);
    struct job *job = issue(VM_OP_WRITE, 0, 4 * KIB, buffer, io_flags);
    begin();
    struct vm_fault fault = expect(VM_FAULT_FILL);
    fill_alike(&fault, LEAF_UNITS, UNIT, VM_DATA, 0);
    until_started(1);
    assert(stats().in_flight == 1);
    end_sync(0, GOOD);
    assert(result_of(job) == 0);

    job = issue(VM_OP_WRITE_ZEROES, KIB, 2 * CLUSTER, NULL, io_flags);
    fault = expect(VM_FAULT_ZERO);
    assert(fault.offset == CLUSTER && fault.length == CLUSTER && started() == 1);
    vm_answer(engine, fault.id, 0);
    until_started(2);
    assert(stats().in_flight == 1);
    end_sync(1, GOOD);
    assert(result_of(job) == 0);

    job = issue(VM_OP_WRITE_ZEROES, 2 * CLUSTER, CLUSTER, NULL, io_flags | VM_IO_NOUNMAP);
    until_started(3);
    assert(stats().in_flight == 1 && stats().host_writes == 1 + 2 + 1);
    end_sync(2, BAD);
    assert(result_of(job) == -EIO);
    tear_down();
}

/* New mappings are the Pager's to make durable, and a commit under way is not passed by. */
static void test_after_an_allocation_the_pager_is_asked(void)
{
    struct vm_dirty dirty[4];
    set_up(VM_WRITETHROUGH);
    struct job *job = issue(VM_OP_WRITE, 0, 4 * KIB, buffer, 0);
    begin();
    struct vm_fault fault = expect(VM_FAULT_FILL);
    fill_alike(&fault, LEAF_UNITS, UNIT, VM_ABSENT, 0);
    fault = expect(VM_FAULT_REFILL);
    vm_pool_add(engine, 0, MIB, 4, 0);
    vm_answer(engine, fault.id, 0);
    fault = expect(VM_FAULT_FLUSH);
    assert(stats().in_flight == 1);
    assert(vm_dirty_take(engine, dirty, 4) == 1 && dirty[0].cluster == 0);
    struct job *other = issue(VM_OP_WRITE, 0, 4 * KIB, buffer, 0);  // mapped by now
    struct vm_fault second = expect(VM_FAULT_FLUSH);
    vm_dirty_done(engine, 0);
    vm_answer(engine, fault.id, 0);
    assert(result_of(job) == 0 && stats().in_flight == 1);
    vm_answer(engine, second.id, 0);
    assert(result_of(other) == 0 && started() == 0);
    tear_down();
}

static void test_a_flush_before_the_first_write_has_nothing_to_do(void)
{
    set_up(0);
    assert(vm_io(engine, VM_OP_FLUSH, 0, 0, NULL, 0) == 0);
    expect_none();
    assert(started() == 0);
    tear_down();
}

/* It is told once to each open file, so a sync of the Pager's must not take ours away. */
static void test_the_engine_syncs_an_open_file_of_its_own(void)
{
    struct stat theirs, ours;
    set_up(0);
    write_one();
    struct job *flush = issue(VM_OP_FLUSH, 0, 0, NULL, 0);
    until_started(1);
    assert(!fstat(files[0], &theirs) && !fstat(syncs[0].fd, &ours));
    assert(theirs.st_dev == ours.st_dev && theirs.st_ino == ours.st_ino);
    assert(lseek(files[0], 4096, SEEK_SET) == 4096 && lseek(syncs[0].fd, 0, SEEK_CUR) == 0);
    end_sync(0, GOOD);
    assert(result_of(flush) == 0);
    tear_down();
}

static void test_stop_ends_flushes(void)
{
    set_up(0);
    write_one();
    struct job *first = issue(VM_OP_FLUSH, 0, 0, NULL, 0);
    until_started(1);
    struct job *second = issue(VM_OP_FLUSH, 0, 0, NULL, 0);
    until_in_flight(2);
    vm_engine_stop(engine);
    assert(result_of(second) == -ESHUTDOWN);
    end_sync(0, GOOD);
    assert(result_of(first) == 0);  // it was under way
    tear_down();
}

int main(void)
{
    test_no_flush_succeeds_once_a_sync_has_failed();
    test_a_flush_is_not_served_by_a_sync_that_began_before_its_write();
    test_flushes_that_wait_share_the_next_sync();
    test_durable_writes_wait_for_their_sync(VM_WRITETHROUGH, 0);
    test_durable_writes_wait_for_their_sync(0, VM_IO_FUA);
    test_after_an_allocation_the_pager_is_asked();
    test_a_flush_before_the_first_write_has_nothing_to_do();
    test_the_engine_syncs_an_open_file_of_its_own();
    test_stop_ends_flushes();
    return 0;
}

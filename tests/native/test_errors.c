/* Host requests that fail: the errno reaches the request, what was there before is still there, host
 * clusters that were written in part are LOST, and the engine goes on. */
#include "harness.h"

enum { UNIT = 4 * KIB, CLUSTER = 64 * KIB, LEAF_UNITS = 256, DISK = 8 * MIB };
enum { TOP, FULL, READ_ONLY, WRITE_ONLY, PARENT };

static uint8_t buffer[MIB], back[MIB];

static void set_up(uint32_t flags)
{
    struct vm_config config = {.size = DISK, .sector_size = 512, .unit_shift = 12,
                               .cluster_shift = 16, .leaf_units = LEAF_UNITS,
                               .flags = VM_CAN_ZERO | VM_CAN_DISCARD | flags};
    char name[] = "/tmp/vm-test-XXXXXX";
    create(&config);
    add_file(temporary(), true);
    add_file(open("/dev/full", O_RDWR | O_CLOEXEC), true);
    int fd = mkstemp(name);
    assert(ftruncate(fd, DISK) == 0);
    add_file(open(name, O_RDONLY | O_CLOEXEC), true);
    add_file(open(name, O_WRONLY | O_CLOEXEC), false);
    unlink(name);
    close(fd);
    add_file(temporary(), false);
    memset(buffer, 0xc0, sizeof buffer);
    for (int i = 0; i < 8; i++)
        assert(pwrite(files[PARENT], buffer, MIB, (uint64_t)i * MIB) == MIB);
    memset(buffer, 0x5a, sizeof buffer);
    start_loop();
}

/* The first leaf is TOP's, at the guest's offset, and the session has begun. */
static void begun(void)
{
    struct job *job = issue(VM_OP_WRITE, 0, 4 * KIB, buffer, 0);
    begin();
    struct vm_fault fault = expect(VM_FAULT_FILL);
    fill_alike(&fault, LEAF_UNITS, UNIT, VM_DATA, TOP);
    assert(result_of(job) == 0);
}

static void fill_next(uint32_t kind, uint32_t source)
{
    struct vm_fault fault = expect(VM_FAULT_FILL);
    fill_alike(&fault, LEAF_UNITS, UNIT, kind, source);
}

static void refill(uint32_t file, uint64_t host, uint64_t count)
{
    struct vm_fault fault = expect(VM_FAULT_REFILL);
    vm_pool_add(engine, file, host, count, 0);
    vm_answer(engine, fault.id, 0);
}

static void expect_failed(int error)
{
    struct vm_fault fault = expect(VM_FAULT_FAILED);
    assert(fault.id == 0 && fault.arg == (uint64_t)error);
}

static void expect_lost(uint32_t file, uint64_t host, uint64_t count)
{
    struct vm_fault fault = expect(VM_FAULT_LOST);
    assert(fault.id == 0 && fault.arg == file && fault.offset == host);
    assert(fault.length == count * CLUSTER);
}

static bool read_back(uint64_t offset, uint64_t length, uint8_t value)
{
    assert(vm_io(engine, VM_OP_READ, offset, length, back, 0) == 0);
    return all_bytes(back, length, value);
}

static void limit_files_to(rlim_t bytes)
{
    struct rlimit limit = {bytes, RLIM_INFINITY};
    assert(setrlimit(RLIMIT_FSIZE, &limit) == 0);
}

static void tear_down(void)
{
    limit_files_to(RLIM_INFINITY);
    expect_none();
    assert(stats().in_flight == 0);
    finish_all();
}

static void test_writes_in_place(void)
{
    set_up(0);
    begun();
    struct job *job = issue(VM_OP_WRITE, MIB, 4 * KIB, buffer, 0);
    fill_next(VM_DATA, READ_ONLY);
    assert(result_of(job) == -EBADF);
    expect_failed(EBADF);
    job = issue(VM_OP_WRITE, 2 * MIB, 4 * KIB, buffer, VM_IO_FUA);
    fill_next(VM_DATA, FULL);
    assert(result_of(job) == -ENOSPC);
    expect_failed(ENOSPC);
    assert(stats().host_syncs == 0);  // nothing to make durable
    assert(vm_io(engine, VM_OP_WRITE_ZEROES, 2 * MIB + 512, 512, NULL, 0) == -ENOSPC);
    expect_failed(ENOSPC);
    limit_files_to(8 * KIB);
    assert(vm_io(engine, VM_OP_WRITE, 4 * KIB, 8 * KIB, buffer, 0) == -EFBIG);  // half of it
    expect_failed(EFBIG);
    assert(read_back(0, 8 * KIB, 0x5a) && read_back(8 * KIB, 4 * KIB, 0));
    limit_files_to(RLIM_INFINITY);
    // None of this is the end: only a failed sync or commit is.
    assert(vm_io(engine, VM_OP_WRITE, 4 * KIB, 8 * KIB, buffer, 0) == 0);
    assert(read_back(0, 12 * KIB, 0x5a) && stats().failed == 0);
    assert(vm_io(engine, VM_OP_FLUSH, 0, 0, NULL, 0) == -EINVAL);  // /dev/full cannot be synced
    expect_failed(EINVAL);
    assert(stats().failed == -EINVAL);
    tear_down();
}

static void test_reads(void)
{
    set_up(0);
    struct job *job = issue(VM_OP_READ, MIB - 4 * KIB, 8 * KIB, back, 0);
    fill_next(VM_DATA, TOP);
    fill_next(VM_DATA, WRITE_ONLY);
    assert(result_of(job) == -EBADF);
    job = issue(VM_OP_READ, 2 * MIB, 8 * KIB, back, 0);
    fill_next(VM_INVALID, 0);
    assert(result_of(job) == -EIO);
    assert(read_back(0, 4 * KIB, 0) && stats().failed == 0);
    expect_none();
    tear_down();
}

/* One request, two new clusters, one host file that takes only the first: that one is kept. */
static void test_a_part_of_a_request(void)
{
    set_up(0);
    begun();
    limit_files_to(3 * MIB);
    struct job *job = issue(VM_OP_WRITE, MIB, 2 * CLUSTER, buffer, 0);
    fill_next(VM_SHARED, PARENT);
    struct vm_fault fault = expect(VM_FAULT_REFILL);
    vm_pool_add(engine, TOP, 2 * MIB, 1, 0);
    vm_pool_add(engine, TOP, 4 * MIB, 1, 0);
    vm_answer(engine, fault.id, 0);
    assert(result_of(job) == -EFBIG);
    fault = expect(VM_FAULT_REFILL);
    vm_pool_add(engine, TOP, 2 * MIB + CLUSTER, 1, 0);
    vm_answer(engine, fault.id, 0);
    expect_failed(EFBIG);
    expect_lost(TOP, 4 * MIB, 1);
    assert(read_back(MIB, CLUSTER, 0x5a) && read_back(MIB + CLUSTER, CLUSTER, 0xc0));
    struct vm_stats now = stats();
    assert(now.dirty == 1 && now.allocations == 1 && now.pool == 1);
    assert(vm_io(engine, VM_OP_WRITE, MIB + CLUSTER, CLUSTER, buffer, 0) == 0);  // a new try
    assert(read_back(MIB, 2 * CLUSTER, 0x5a) && stats().dirty == 2);
    expect(VM_FAULT_REFILL);
    tear_down();
}

/* Adjacent clusters in one host write: if it stops half-way, all of them are lost. */
static void test_joined_clusters(void)
{
    set_up(0);
    begun();
    limit_files_to(2 * MIB + CLUSTER + 512);
    struct job *job = issue(VM_OP_WRITE, MIB, 3 * CLUSTER, buffer, 0);
    fill_next(VM_ABSENT, 0);
    refill(TOP, 2 * MIB, 8);
    assert(result_of(job) == -EFBIG);
    expect_failed(EFBIG);
    expect_lost(TOP, 2 * MIB, 3);
    assert(read_back(MIB, 4 * CLUSTER, 0));
    struct vm_stats now = stats();
    assert(now.dirty == 0 && now.allocations == 0 && now.pool == 5 && now.host_writes == 2);
    limit_files_to(RLIM_INFINITY);
    assert(vm_io(engine, VM_OP_WRITE, MIB, 3 * CLUSTER, buffer, 0) == 0);
    expect(VM_FAULT_REFILL);
    assert(read_back(MIB, 3 * CLUSTER, 0x5a) && read_back(MIB + 3 * CLUSTER, CLUSTER, 0));
    tear_down();
}

/* The copy of the rest of a cluster fails, in reading or in writing, or the data does. */
static void test_copies(void)
{
    set_up(0);
    begun();
    struct job *job = issue(VM_OP_WRITE, MIB + 4 * KIB, 4 * KIB, buffer, 0);
    fill_next(VM_DATA, WRITE_ONLY);
    refill(TOP, 2 * MIB, 1);
    assert(result_of(job) == -EBADF);
    expect_lost(TOP, 2 * MIB, 1);

    job = issue(VM_OP_WRITE, 2 * MIB + 4 * KIB, 4 * KIB, buffer, 0);
    fill_next(VM_SHARED, PARENT);
    refill(FULL, 0, 1);
    assert(result_of(job) == -ENOSPC);
    expect_failed(ENOSPC);  // data and head of the cluster
    expect_failed(ENOSPC);
    expect_lost(FULL, 0, 1);
    assert(read_back(2 * MIB, CLUSTER, 0xc0));

    job = issue(VM_OP_WRITE, 2 * MIB + 4 * KIB, 4 * KIB, buffer, 0);
    struct vm_fault fault = expect(VM_FAULT_REFILL);
    limit_files_to(4 * MIB + 16 * KIB);  // of the tail
    vm_pool_add(engine, TOP, 4 * MIB, 1, 0);
    vm_answer(engine, fault.id, 0);
    assert(result_of(job) == -EFBIG);
    expect_failed(EFBIG);
    expect_lost(TOP, 4 * MIB, 1);
    limit_files_to(RLIM_INFINITY);
    assert(read_back(2 * MIB, CLUSTER, 0xc0) && stats().dirty == 0);

    job = issue(VM_OP_WRITE, 2 * MIB + 4 * KIB, 4 * KIB, buffer, 0);
    refill(TOP, 6 * MIB, 1);
    assert(result_of(job) == 0);
    assert(read_back(2 * MIB, 4 * KIB, 0xc0) && read_back(2 * MIB + 4 * KIB, 4 * KIB, 0x5a));
    assert(read_back(2 * MIB + 8 * KIB, CLUSTER - 8 * KIB, 0xc0));
    assert(stats().dirty == 1 && stats().copies == 4);
    tear_down();
}

/* More pieces than may be in flight, all of which fail. */
static void test_many_pieces(void)
{
    uint64_t entries[LEAF_UNITS];
    set_up(0);
    begun();
    for (int i = 0; i < LEAF_UNITS; i++)  // backwards, so that no two are joined
        entries[i] = (uint64_t)VM_DATA << 60 | (uint64_t)FULL << 52 | (LEAF_UNITS - i) * 8;
    struct job *job = issue(VM_OP_WRITE, MIB, MIB, buffer, 0);
    struct vm_fault fault = expect(VM_FAULT_FILL);
    vm_fill(engine, fault.id, entries, LEAF_UNITS, 0);
    assert(result_of(job) == -ENOSPC);
    uint64_t tried = stats().host_writes - 1;
    assert(tried >= 64 && tried < LEAF_UNITS);  // it gave up
    for (uint64_t i = 0; i < tried; i++)
        expect_failed(ENOSPC);
    assert(vm_io(engine, VM_OP_READ, MIB, MIB, back, 0) == 0 && all_bytes(back, MIB, 0));
    tear_down();
}

int main(void)
{
    test_writes_in_place();
    test_reads();
    test_a_part_of_a_request();
    test_joined_clusters();
    test_copies();
    test_many_pieces();
    return 0;
}

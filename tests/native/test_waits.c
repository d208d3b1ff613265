/* Every reason for which a request waits, and every way in which the wait can end: the answer, an
 * error, the engine's stop, and the answer to an engine that has failed meanwhile. */
#include "harness.h"

enum { UNIT = 4 * KIB, CLUSTER = 64 * KIB, LEAF_UNITS = 256, DISK = 4 * MIB };
enum end { ANSWER, ERROR, STOP, FAILED, ENDS };

static uint8_t buffer[3][MIB];
static uint64_t pool_host;

static void set_up(void)
{
    struct vm_config config = {.size = DISK, .sector_size = 512, .unit_shift = 12,
                               .cluster_shift = 16, .leaf_units = LEAF_UNITS,
                               .flags = VM_CAN_ZERO | VM_CAN_DISCARD};
    create(&config);
    add_file(temporary(), true);
    add_file(temporary(), false);
    start_loop();
    pool_host = MIB;
    memset(buffer, 0x5a, sizeof buffer);
}

static void fill(uint32_t kind, uint32_t source)
{
    struct vm_fault fault = expect(VM_FAULT_FILL);
    fill_alike(&fault, LEAF_UNITS, UNIT, kind, source);
}

static void refill(uint64_t count)
{
    struct vm_fault fault = expect(VM_FAULT_REFILL);
    vm_pool_add(engine, 0, pool_host, count, 0);
    pool_host += count * CLUSTER;
    vm_answer(engine, fault.id, 0);
}

static void inflate(const struct vm_fault *fault, int error)
{
    uint8_t data[CLUSTER];
    memset(data, 0xc0, sizeof data);
    vm_inflated(engine, fault->id, fault->offset / CLUSTER * CLUSTER, data, CLUSTER, error);
}

/* Nothing is left over, and what failed by a stop failed with ESHUTDOWN. */
static void tear_down(enum end end)
{
    struct vm_fault fault;
    if (end != STOP)
        vm_engine_stop(engine);
    join_loop();
    while (vm_faults_wait(engine, &fault, 1, 0) == 1)
        assert(fault.id == 0 || end == STOP);
    struct vm_stats now = stats();
    assert(now.in_flight == 0);
    destroy();
}

static int expected(enum end end, int error)
{
    return end == ANSWER ? 0 : end == ERROR ? error : end == STOP ? -ESHUTDOWN : -EIO;
}

static void leaf(enum end end)
{
    set_up();
    struct job *job = issue(VM_OP_READ, 0, 8 * KIB, buffer[0], 0);
    struct vm_fault fault = expect(VM_FAULT_FILL);
    struct job *other = issue(VM_OP_READ, 512 * KIB, 4 * KIB, buffer[1], 0);
    until_in_flight(2);
    expect_none();  // one question for both
    if (end == ERROR)
        vm_fill(engine, fault.id, NULL, 0, -ENXIO);
    else if (end == STOP)
        vm_engine_stop(engine);
    if (end == FAILED)
        vm_set_failed(engine, -EIO);  // reads do not mind
    if (end == ANSWER || end == FAILED)
        fill_alike(&fault, LEAF_UNITS, UNIT, VM_ZERO, 0);
    int result = end == FAILED ? 0 : expected(end, -ENXIO);
    assert(result_of(job) == result && result_of(other) == result);
    if (end == ERROR) {
        job = issue(VM_OP_READ, 0, 4 * KIB, buffer[0], 0);  // asked again
        fill(VM_ZERO, 0);
        assert(result_of(job) == 0 && all_bytes(buffer[0], 4 * KIB, 0));
    }
    if (end == STOP)  // answered too late
        fill_alike(&fault, LEAF_UNITS, UNIT, VM_ZERO, 0);
    tear_down(end);
}

static void leaf_too_short(void)
{
    uint64_t entries[4] = {0};
    set_up();
    struct job *job = issue(VM_OP_READ, 0, 8 * KIB, buffer[0], 0);
    struct vm_fault fault = expect(VM_FAULT_FILL);
    vm_fill(engine, fault.id, entries, 4, 0);
    assert(result_of(job) == -EINVAL);
    tear_down(ANSWER);
}

static void inflated(enum end end)
{
    set_up();
    struct job *job = issue(VM_OP_READ, 60 * KIB, 8 * KIB, buffer[0], 0);
    fill(VM_COMPRESSED, 1);
    struct vm_fault fault = expect(VM_FAULT_INFLATE);
    assert(fault.offset == 60 * KIB && fault.arg == 1);
    if (end == STOP) {
        vm_engine_stop(engine);
        assert(result_of(job) == -ESHUTDOWN);
        inflate(&fault, 0);
        tear_down(end);
        return;
    }
    if (end == FAILED)
        vm_set_failed(engine, -EIO);
    inflate(&fault, end == ERROR ? -EIO : 0);
    if (end != ERROR) {
        fault = expect(VM_FAULT_INFLATE);  // the second cluster
        assert(fault.offset == 64 * KIB);
        inflate(&fault, 0);
    }
    assert(result_of(job) == (end == ERROR ? -EIO : 0));
    assert(end == ERROR || all_bytes(buffer[0], 8 * KIB, 0xc0));
    tear_down(end);
}

static void inflated_elsewhere(void)
{
    set_up();
    struct job *job = issue(VM_OP_READ, 0, 8 * KIB, buffer[0], 0);
    fill(VM_COMPRESSED, 1);
    struct vm_fault fault = expect(VM_FAULT_INFLATE);
    vm_inflated(engine, fault.id, CLUSTER, buffer[1], CLUSTER, 0);
    assert(result_of(job) == -EIO);
    tear_down(ANSWER);
}

static void beginning(enum end end)
{
    set_up();
    struct job *jobs[3] = {issue(VM_OP_WRITE, 0, 8 * KIB, buffer[0], 0),
                           issue(VM_OP_WRITE_ZEROES, MIB, MIB, NULL, 0),
                           issue(VM_OP_DISCARD, 0, MIB, NULL, 0)};
    struct vm_fault fault = expect(VM_FAULT_BEGIN);
    until_in_flight(3);
    expect_none();
    if (end == FAILED)
        vm_set_failed(engine, -EIO);
    if (end == STOP)
        vm_engine_stop(engine);
    else
        vm_answer(engine, fault.id, end == ERROR ? -ENOSPC : 0);
    if (end == ANSWER) {
        for (struct vm_fault next; next_fault(&next);) {
            if (next.type == VM_FAULT_FILL)
                fill_alike(&next, LEAF_UNITS, UNIT, VM_ABSENT, 0);
            else if (next.type == VM_FAULT_REFILL)
                vm_pool_add(engine, 0, MIB, 4, 0);
            vm_answer(engine, next.id, 0);
        }
    }
    for (int i = 0; i < 3; i++)
        assert(result_of(jobs[i]) == expected(end, -ENOSPC));
    if (end == ERROR) {  // the next write asks again
        struct job *job = issue(VM_OP_WRITE, 0, 8 * KIB, buffer[0], 0);
        begin();
        fill(VM_DATA, 0);
        assert(result_of(job) == 0);
    }
    tear_down(end);
}

static void pool(enum end end)
{
    set_up();
    struct job *job = issue(VM_OP_WRITE, 0, 8 * KIB, buffer[0], 0);
    begin();
    fill(VM_ABSENT, 0);
    struct vm_fault fault = expect(VM_FAULT_REFILL);
    struct job *other = issue(VM_OP_WRITE, 512 * KIB, 200 * KIB, buffer[0], 0);
    until_in_flight(2);
    expect_none();
    if (end == FAILED)
        vm_set_failed(engine, -EIO);
    if (end != STOP && end != ERROR)
        vm_pool_add(engine, 0, MIB, 1, 0);  // not enough for both
    if (end == STOP)
        vm_engine_stop(engine);
    else
        vm_answer(engine, fault.id, end == ERROR ? -ENOSPC : 0);
    if (end == ANSWER)
        refill(10);
    assert(result_of(job) == expected(end, -ENOSPC));
    assert(result_of(other) == expected(end, -ENOSPC));
    tear_down(end);
}

/* Clusters that came with an error are used all the same; only those without fail. */
static void pool_partly(void)
{
    set_up();
    struct job *job = issue(VM_OP_WRITE, 0, 2 * CLUSTER, buffer[0], 0);
    begin();
    fill(VM_ABSENT, 0);
    struct vm_fault fault = expect(VM_FAULT_REFILL);
    vm_pool_add(engine, 0, MIB, 1, 0);
    vm_answer(engine, fault.id, -ENOSPC);
    fault = expect(VM_FAULT_REFILL);
    vm_answer(engine, fault.id, -EDQUOT);
    assert(result_of(job) == -EDQUOT);
    assert(!vm_io(engine, VM_OP_READ, 0, 2 * CLUSTER, buffer[1], 0));
    assert(all_bytes(buffer[1], CLUSTER, 0x5a) && all_bytes(buffer[1] + CLUSTER, CLUSTER, 0));
    struct vm_stats now = stats();
    assert(now.dirty == 1 && now.pool == 0 && now.allocations == 1);
    tear_down(ANSWER);
}

/* A write to a cluster that another write is giving a place to. */
static void busy(enum end end)
{
    set_up();
    struct job *first = issue(VM_OP_WRITE, 4 * KIB, 4 * KIB, buffer[0], 0);
    begin();
    fill(VM_COMPRESSED, 1);
    refill(4);
    struct vm_fault fault = expect(VM_FAULT_INFLATE);  // of the copy
    struct job *second = issue(VM_OP_WRITE, 12 * KIB, 4 * KIB, buffer[0], 0);
    struct job *discard = issue(VM_OP_DISCARD, 0, MIB, NULL, 0);
    struct job *reader = issue(VM_OP_READ, MIB, 4 * KIB, buffer[1], 0);
    fill(VM_ZERO, 0);  // others go on
    assert(result_of(reader) == 0);
    until_in_flight(3);
    expect_none();  // neither of them allocates or asks
    if (end == STOP) {
        vm_engine_stop(engine);
        assert(result_of(first) == -ESHUTDOWN && result_of(second) == -ESHUTDOWN);
        assert(result_of(discard) == -ESHUTDOWN);
        fault = expect(VM_FAULT_LOST);
        assert(fault.offset == MIB && fault.length == CLUSTER && fault.arg == 0);
        tear_down(end);
        return;
    }
    if (end == FAILED)
        vm_set_failed(engine, -EIO);
    inflate(&fault, end == ERROR ? -EIO : 0);
    if (end == ERROR) {
        // The first loses its cluster; the second tries anew, the discard as it comes.
        assert(result_of(first) == -EIO);
        for (struct vm_fault next; next_fault(&next);) {
            if (next.type == VM_FAULT_INFLATE)
                inflate(&next, 0);
            else if (next.type == VM_FAULT_DISCARD)
                vm_answer(engine, next.id, 0);
            else
                assert(next.type == VM_FAULT_LOST);
        }
        assert(result_of(second) == 0 && result_of(discard) == 0);
        tear_down(end);
        return;
    }
    assert(result_of(first) == 0);
    if (end == ANSWER) {
        fault = expect(VM_FAULT_DISCARD);
        vm_answer(engine, fault.id, -EOPNOTSUPP);  // it remains
    }
    assert(result_of(second) == (end == ANSWER ? 0 : -EIO));
    assert(result_of(discard) == (end == ANSWER ? 0 : -EIO));
    assert(!vm_io(engine, VM_OP_READ, 0, 64 * KIB, buffer[1], 0));
    assert(all_bytes(buffer[1], 4 * KIB, 0xc0) && all_bytes(buffer[1] + 4 * KIB, 4 * KIB, 0x5a));
    assert(all_bytes(buffer[1] + 12 * KIB, 4 * KIB, end == ANSWER ? 0x5a : 0xc0));
    assert(all_bytes(buffer[1] + 16 * KIB, 48 * KIB, 0xc0));
    assert(stats().allocations == 1);
    tear_down(end);
}

/* What overlaps a range that is being discarded or made zero waits, all else does not. */
static void range(uint32_t op, enum end end)
{
    set_up();
    struct job *zero = issue(op, CLUSTER, CLUSTER, NULL, 0);
    begin();
    struct vm_fault fault = expect(op == VM_OP_DISCARD ? VM_FAULT_DISCARD : VM_FAULT_ZERO);
    assert(fault.offset == CLUSTER && fault.length == CLUSTER);
    struct job *waiting[3];
    waiting[0] = issue(VM_OP_READ, 60 * KIB, 8 * KIB, buffer[0], 0);
    until_in_flight(2);
    waiting[1] = issue(VM_OP_WRITE, 124 * KIB, 8 * KIB, buffer[1], 0);
    until_in_flight(3);
    waiting[2] = issue(op, 0, 4 * CLUSTER, NULL, 0);
    struct job *before = issue(VM_OP_READ, 0, CLUSTER, buffer[2], 0);
    fill(VM_DATA, 0);
    assert(result_of(before) == 0);
    assert(vm_io(engine, VM_OP_WRITE, 2 * CLUSTER, CLUSTER, buffer[2], 0) == 0);
    until_in_flight(4);
    expect_none();
    if (end == FAILED)
        vm_set_failed(engine, -EIO);
    if (end == STOP)
        vm_engine_stop(engine);
    else
        vm_answer(engine, fault.id, end == ERROR ? -EROFS : 0);
    assert(result_of(zero) == (end == FAILED ? 0 : expected(end, -EROFS)));
    assert(result_of(waiting[0]) == (end == STOP ? -ESHUTDOWN : 0));
    if (end == FAILED || end == STOP) {
        assert(result_of(waiting[1]) == expected(end, 0));
        assert(result_of(waiting[2]) == expected(end, 0));
        tear_down(end);
        return;
    }
    for (struct vm_fault next; next_fault(&next);) {
        if (next.type == VM_FAULT_REFILL)
            vm_pool_add(engine, 0, MIB, 1, 0);
        vm_answer(engine, next.id, 0);
    }
    assert(result_of(waiting[1]) == 0 && result_of(waiting[2]) == 0);
    tear_down(end);
}

static void flush_answered(enum end end)
{
    set_up();
    struct job *write = issue(VM_OP_WRITE, 0, CLUSTER, buffer[0], 0);
    begin();
    fill(VM_ABSENT, 0);
    refill(4);
    assert(result_of(write) == 0);
    struct job *flushes[2] = {issue(VM_OP_FLUSH, 0, 0, NULL, 0),
                              issue(VM_OP_WRITE, 0, KIB, buffer[0], VM_IO_FUA)};
    struct vm_fault first = expect(VM_FAULT_FLUSH), second = expect(VM_FAULT_FLUSH);
    if (end == FAILED)
        vm_set_failed(engine, -EIO);
    if (end == STOP) {
        vm_engine_stop(engine);
    } else {
        vm_answer(engine, second.id, end == ERROR ? -EDQUOT : 0);
        vm_answer(engine, first.id, end == ERROR ? -EDQUOT : 0);
        vm_answer(engine, first.id, 0);  // nobody is hurt by a second answer
    }
    // A failure that came in between may be about what these were to make durable.
    assert(result_of(flushes[0]) == expected(end, -EDQUOT));
    assert(result_of(flushes[1]) == expected(end, -EDQUOT));
    tear_down(end);
}

/* Copies hold memory for as long as the Pager takes; further ones wait for it. */
static void copies(enum end end)
{
    enum { BIG = 256 * KIB, JOBS = 100 };
    static uint8_t data[BIG];
    struct vm_config config = {.size = JOBS * BIG, .sector_size = 512, .unit_shift = 18,
                               .cluster_shift = 18, .leaf_units = 128};
    struct job *jobs[JOBS];
    struct vm_fault faults[JOBS], fault;
    create(&config);
    add_file(temporary(), true);
    start_loop();
    for (int i = 0; i < JOBS; i++)
        jobs[i] = issue(VM_OP_WRITE, (uint64_t)i * BIG + 512, 512, buffer[0], 0);
    begin();
    fault = expect(VM_FAULT_FILL);
    fill_alike(&fault, 128, BIG, VM_COMPRESSED, 0);
    fault = expect(VM_FAULT_REFILL);
    vm_pool_add(engine, 0, MIB, 2 * JOBS, 0);
    vm_answer(engine, fault.id, 0);
    until_in_flight(JOBS);
    int count = vm_faults_wait(engine, faults, JOBS, 0);
    assert(count == 64);  // 16 MiB of them
    expect_none();
    if (end == STOP)
        vm_engine_stop(engine);
    for (int i = 0; i < count; i++)
        vm_inflated(engine, faults[i].id, faults[i].offset, data, BIG, end == ERROR ? -EIO : 0);
    while (next_fault(&fault))
        if (fault.type == VM_FAULT_INFLATE)
            vm_inflated(engine, fault.id, fault.offset, data, BIG, end == ERROR ? -EIO : 0);
        else
            assert(end != ANSWER && fault.type == VM_FAULT_LOST);
    for (int i = 0; i < JOBS; i++)
        assert(result_of(jobs[i]) == expected(end, -EIO));
    tear_down(end);
}

int main(void)
{
    for (enum end end = ANSWER; end < ENDS; end++) {
        leaf(end);
        inflated(end);
        beginning(end);
        pool(end);
        busy(end);
        range(VM_OP_DISCARD, end);
        range(VM_OP_WRITE_ZEROES, end);
        flush_answered(end);
    }
    copies(ANSWER);
    copies(ERROR);
    copies(STOP);
    leaf_too_short();
    inflated_elsewhere();
    pool_partly();
    return 0;
}

/* What waits for host requests in flight: drains, discards, copies of clusters that are partly
 * written in place.  A socket as a host file holds requests in flight as long as the test wants. */
#include "harness.h"

#include <sys/socket.h>

enum { UNIT = 4 * KIB, CLUSTER = 64 * KIB, LEAF_UNITS = 256, DISK = 4 * MIB };
enum { TOP, SLOW };

static uint8_t buffer[2][CLUSTER];
static int slow;  /* the other end of SLOW */

static void set_up(void)
{
    struct vm_config config = {.size = DISK, .sector_size = 512, .unit_shift = 12,
                               .cluster_shift = 16, .leaf_units = LEAF_UNITS,
                               .flags = VM_CAN_ZERO | VM_CAN_DISCARD};
    int ends[2];
    create(&config);
    assert(add_file(temporary(), true) == TOP);
    assert(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    assert(add_file(ends[0], true) == SLOW);
    slow = ends[1];
    start_loop();
    memset(buffer, 0x5a, sizeof buffer);
}

static void tear_down(void)
{
    close(slow);
    finish_all();
}

/* No write to SLOW ends before let_writes_end. */
static void hold_writes(void)
{
    static const uint8_t data[64 * KIB];
    int flags = fcntl(files[SLOW], F_GETFL);
    fcntl(files[SLOW], F_SETFL, flags | O_NONBLOCK);
    while (write(files[SLOW], data, sizeof data) > 0)
        ;
    assert(errno == EAGAIN);
    fcntl(files[SLOW], F_SETFL, flags);
}

/* Let the write that is in flight end. */
static int result_of_write(struct job *job)
{
    static uint8_t data[MIB];
    while (recv(slow, data, sizeof data, MSG_DONTWAIT) > 0)
        ;
    return result_of(job);
}

/* A leaf in SLOW, but for the units from `absent` on of each cluster. */
static void fill_slow(uint32_t absent)
{
    struct vm_fault fault = expect(VM_FAULT_FILL);
    uint64_t entries[LEAF_UNITS] = {0};
    for (uint32_t i = 0; i < LEAF_UNITS; i++)
        if (i % (CLUSTER / UNIT) < absent)
            entries[i] = (uint64_t)VM_DATA << 60 | (uint64_t)SLOW << 52 | i * (UNIT >> 9);
    vm_fill(engine, fault.id, entries, LEAF_UNITS, 0);
}

static void begun(void)
{
    struct job *job = issue(VM_OP_WRITE, MIB, 512, buffer[0], 0);
    begin();
    struct vm_fault fault = expect(VM_FAULT_FILL);
    fill_alike(&fault, LEAF_UNITS, UNIT, VM_DATA, TOP);
    assert(result_of(job) == 0);
}

static void until_submitted(uint64_t requests)
{
    for (;;) {
        struct vm_stats now = stats();
        if (now.host_reads + now.host_writes >= requests)
            return;
        sched_yield();
    }
}

static void *drain(void *ret)
{
    assert(vm_drain(engine) == 0);
    __atomic_fetch_add((int *)ret, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static void test_drains_from_several_threads(void)
{
    pthread_t threads[6];
    int done = 0;
    set_up();
    begun();
    struct job *reader = issue(VM_OP_READ, 0, 4 * KIB, buffer[0], 0);
    fill_slow(CLUSTER / UNIT);
    until_submitted(2);
    for (int i = 0; i < 6; i++)
        pthread_create(&threads[i], NULL, drain, &done);
    for (int i = 0; i < 100; i++)  // what is in flight later does not matter to them
        assert(!vm_io(engine, VM_OP_READ, MIB, UNIT, buffer[1], 0));
    assert(__atomic_load_n(&done, __ATOMIC_SEQ_CST) == 0 && stats().in_flight == 1);
    assert(write(slow, buffer[1], 4 * KIB) == 4 * KIB);
    assert(result_of(reader) == 0);
    for (int i = 0; i < 6; i++)
        pthread_join(threads[i], NULL);
    assert(vm_drain(engine) == 0);
    tear_down();
}

static void test_a_discard_is_asked_once_nothing_uses_its_clusters(uint32_t op, bool reading)
{
    set_up();
    begun();
    hold_writes();
    struct job *first = issue(reading ? VM_OP_READ : VM_OP_WRITE, 0, 4 * KIB, buffer[0], 0);
    fill_slow(CLUSTER / UNIT);
    until_submitted(2);
    struct job *discard = issue(op, 0, CLUSTER, NULL, 0);
    until_in_flight(2);
    expect_none();
    // From now on others keep out, so that it has its turn.
    struct job *late = issue(VM_OP_READ, 8 * KIB, 4 * KIB, buffer[1], 0);
    until_in_flight(3);
    if (reading)
        assert(write(slow, buffer[1], 4 * KIB) == 4 * KIB);
    assert((reading ? result_of(first) : result_of_write(first)) == 0);
    struct vm_fault fault = expect(op == VM_OP_DISCARD ? VM_FAULT_DISCARD : VM_FAULT_ZERO);
    assert(stats().in_flight == 2);
    vm_answer(engine, fault.id, 0);
    assert(result_of(discard) == 0 && result_of(late) == 0 && all_bytes(buffer[1], 4 * KIB, 0));
    tear_down();
}

/* A cluster may be the top image's in part only.  What is being written there in place belongs
 * into the copy. */
static void test_a_copy_waits_for_writes_in_place(void)
{
    set_up();
    begun();
    hold_writes();
    struct job *in_place = issue(VM_OP_WRITE, 0, 4 * KIB, buffer[0], 0);
    fill_slow(2);
    until_submitted(2);
    struct job *allocating = issue(VM_OP_WRITE, 12 * KIB, 4 * KIB, buffer[0], 0);
    struct vm_fault fault = expect(VM_FAULT_REFILL);
    vm_pool_add(engine, TOP, 2 * MIB, 4, 0);
    vm_answer(engine, fault.id, 0);
    until_in_flight(2);
    until_submitted(3);  // the data of the second, but no read of the copy
    assert(stats().host_reads == 0);
    assert(result_of_write(in_place) == 0);
    until_submitted(4);
    memset(buffer[1], 0xc0, sizeof buffer[1]);
    assert(write(slow, buffer[1], 8 * KIB) == 8 * KIB);
    assert(result_of(allocating) == 0);
    assert(vm_io(engine, VM_OP_READ, 0, CLUSTER, buffer[1], 0) == 0);
    assert(all_bytes(buffer[1], 8 * KIB, 0xc0) && all_bytes(buffer[1] + 8 * KIB, 4 * KIB, 0));
    assert(all_bytes(buffer[1] + 12 * KIB, 4 * KIB, 0x5a));
    assert(all_bytes(buffer[1] + 16 * KIB, 48 * KIB, 0));
    tear_down();
}

/* The same with the engine stopped while the copy waits. */
static void test_a_copy_that_waits_ends_with_the_engine(void)
{
    set_up();
    begun();
    hold_writes();
    struct job *in_place = issue(VM_OP_WRITE, 0, 4 * KIB, buffer[0], 0);
    fill_slow(2);
    until_submitted(2);
    struct job *allocating = issue(VM_OP_WRITE, 12 * KIB, 4 * KIB, buffer[0], 0);
    struct vm_fault fault = expect(VM_FAULT_REFILL);
    vm_pool_add(engine, TOP, 2 * MIB, 4, 0);
    vm_answer(engine, fault.id, 0);
    until_in_flight(2);
    vm_engine_stop(engine);
    assert(result_of(allocating) == -ESHUTDOWN);
    fault = expect(VM_FAULT_LOST);
    assert(fault.offset == 2 * MIB && fault.length == CLUSTER);
    assert(result_of_write(in_place) == 0);
    tear_down();
}

int main(void)
{
    test_drains_from_several_threads();
    test_a_discard_is_asked_once_nothing_uses_its_clusters(VM_OP_DISCARD, false);
    test_a_discard_is_asked_once_nothing_uses_its_clusters(VM_OP_DISCARD, true);
    test_a_discard_is_asked_once_nothing_uses_its_clusters(VM_OP_WRITE_ZEROES, false);
    test_a_copy_waits_for_writes_in_place();
    test_a_copy_that_waits_ends_with_the_engine();
    return 0;
}

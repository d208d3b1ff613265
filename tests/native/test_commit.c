/* New mappings on their way to the driver: order, barriers, and what a commit that fails leaves. */
#include "harness.h"

enum { CLUSTER = 64 * KIB, LEAF_UNITS = 16, DISK = 16 * MIB };

static uint8_t buffer[MIB], back[MIB];

static void set_up(void)
{
    struct vm_config config = {.size = DISK, .sector_size = 512, .unit_shift = 16,
                               .cluster_shift = 16, .leaf_units = LEAF_UNITS, .map_bytes = 1};
    create(&config);
    add_file(temporary(), true);
    add_file(temporary(), false);
    start_loop();
    memset(buffer, 0x5a, sizeof buffer);
}

/* A write into the leaf at offset, all of whose clusters are of this kind. */
static void write_leaf(uint64_t offset, uint64_t length, uint32_t kind, bool first)
{
    struct job *job = issue(VM_OP_WRITE, offset, length, buffer, 0);
    if (first)
        begin();
    struct vm_fault fault = expect(VM_FAULT_FILL);
    fill_alike(&fault, LEAF_UNITS, CLUSTER, kind, 1);
    if (first) {
        fault = expect(VM_FAULT_REFILL);
        vm_pool_add(engine, 0, 32 * MIB, 100, 0);
        vm_answer(engine, fault.id, 0);
    }
    assert(result_of(job) == 0);
}

static void test_barriers(void)
{
    struct vm_dirty dirty[16];
    set_up();
    write_leaf(2 * MIB, CLUSTER, VM_ABSENT, true);
    write_leaf(MIB, 2 * CLUSTER, VM_SHARED, false);
    write_leaf(3 * MIB, 512, VM_DATA, false);  // a parent's
    write_leaf(0, 512, VM_ZERO, false);
    assert(vm_dirty_take(engine, dirty, 16) == 5);
    static const uint64_t clusters[] = {0, 16, 17, 32, 48};
    static const bool hides[] = {false, true, true, false, true};
    for (int i = 0; i < 5; i++)
        assert(dirty[i].cluster == clusters[i] && dirty[i].barrier == hides[i] && !dirty[i].file);
    assert(dirty[2].host_offset == dirty[1].host_offset + CLUSTER);
    assert(vm_dirty_take(engine, dirty, 16) == -EBUSY);
    vm_dirty_done(engine, 0);
    assert(vm_dirty_take(engine, dirty, 16) == 0);
    finish_all();
}

/* One host write for clusters of which only the last hides data, or was used before. */
static void test_barriers_of_joined_clusters(bool reused)
{
    struct vm_dirty dirty[4];
    uint64_t entries[LEAF_UNITS] = {0};
    entries[2] = reused ? 0 : (uint64_t)VM_SHARED << 60 | 1ull << 52;
    set_up();
    struct job *job = issue(VM_OP_WRITE, 0, 3 * CLUSTER, buffer, 0);
    begin();
    struct vm_fault fault = expect(VM_FAULT_FILL);
    vm_fill(engine, fault.id, entries, LEAF_UNITS, 0);
    fault = expect(VM_FAULT_REFILL);
    vm_pool_add(engine, 0, MIB, 2, 0);
    vm_pool_add(engine, 0, MIB + 2 * CLUSTER, 40, reused);
    vm_answer(engine, fault.id, 0);
    assert(result_of(job) == 0 && stats().host_writes == 1);
    assert(vm_dirty_take(engine, dirty, 4) == 3);
    assert(dirty[0].barrier && dirty[1].barrier && dirty[2].barrier);
    vm_dirty_done(engine, 0);
    finish_all();
}

/* Only the map knows those clusters from then on, however little room it has. */
static void test_what_could_not_be_committed_stays_known(void)
{
    struct vm_dirty dirty[4];
    set_up();
    write_leaf(0, CLUSTER, VM_ABSENT, true);
    write_leaf(MIB, CLUSTER, VM_ABSENT, false);
    assert(vm_dirty_take(engine, dirty, 1) == 1 && dirty[0].cluster == 0);
    vm_dirty_done(engine, -EDQUOT);
    assert(stats().failed == -EDQUOT && stats().dirty == 1);
    assert(vm_io(engine, VM_OP_WRITE, 0, 512, buffer, 0) == -EDQUOT);
    assert(vm_io(engine, VM_OP_FLUSH, 0, 0, NULL, 0) == -EDQUOT);
    for (uint64_t at = 2 * MIB; at < DISK; at += MIB) {
        struct job *job = issue(VM_OP_READ, at, 512, back, 0);
        struct vm_fault fault = expect(VM_FAULT_FILL);
        fill_alike(&fault, LEAF_UNITS, CLUSTER, VM_ABSENT, 0);
        assert(result_of(job) == 0);
    }
    assert(vm_io(engine, VM_OP_READ, 0, CLUSTER, back, 0) == 0 && all_bytes(back, CLUSTER, 0x5a));
    assert(vm_io(engine, VM_OP_READ, MIB, CLUSTER, back, 0) == 0 && all_bytes(back, CLUSTER, 0x5a));
    expect_none();  // neither was asked for again
    finish_all();
}

/* What has been committed may be dropped, and is asked for again. */
static void test_what_was_committed_is_no_longer_pinned(void)
{
    struct vm_dirty dirty[4];
    set_up();
    write_leaf(0, CLUSTER, VM_ABSENT, true);
    assert(vm_dirty_take(engine, dirty, 4) == 1);
    vm_dirty_done(engine, 0);
    write_leaf(MIB, CLUSTER, VM_ABSENT, false);
    struct job *job = issue(VM_OP_READ, 0, 512, back, 0);
    struct vm_fault fault = expect(VM_FAULT_FILL);
    assert(fault.offset == 0);
    fill_alike(&fault, LEAF_UNITS, CLUSTER, VM_ZERO, 0);
    assert(result_of(job) == 0 && all_bytes(back, 512, 0));
    finish_all();
}

int main(void)
{
    test_barriers();
    test_barriers_of_joined_clusters(false);
    test_barriers_of_joined_clusters(true);
    test_what_could_not_be_committed_stays_known();
    test_what_was_committed_is_no_longer_pinned();
    return 0;
}

/* A disk of zones: new clusters of each lie in a file of its own, and a zone that gets none fails
 * alone. */
#include "harness.h"

enum { UNIT = 64 * KIB, CLUSTER = 64 * KIB, LEAF_UNITS = 64, DISK = 8 * MIB };
enum { FIRST, SECOND, THIRD };

static uint8_t buffer[4 * MIB], back[4 * MIB];
static const uint64_t ends[] = {2 * MIB + CLUSTER, 4 * MIB, DISK};
static const uint32_t owners[] = {FIRST, SECOND, THIRD};

static void set_up(void)
{
    struct vm_config config = {.size = DISK, .sector_size = 512, .unit_shift = 16,
                               .cluster_shift = 16, .leaf_units = LEAF_UNITS};
    create(&config);
    for (int i = 0; i < 3; i++)
        add_file(temporary(), true);
    assert(vm_engine_set_zones(engine, ends, owners, 3) == 0);
    for (uint32_t i = 0; i < sizeof buffer; i++)
        buffer[i] = i >> 16 | 0x80;
    start_loop();
}

/* The pager, until the job is done: of what is asked for THIRD nothing can be had. */
static int pager(struct job *job)
{
    uint64_t next[3] = {MIB, 2 * MIB, 3 * MIB};
    while (pthread_tryjoin_np(job->thread, NULL) == EBUSY) {
        struct vm_fault fault;
        if (vm_faults_wait(engine, &fault, 1, 10) <= 0)
            continue;
        if (fault.type == VM_FAULT_FILL) {
            fill_alike(&fault, LEAF_UNITS, UNIT, VM_ABSENT, 0);
        } else if (fault.type == VM_FAULT_BEGIN) {
            vm_answer(engine, fault.id, 0);
        } else {
            assert(fault.type == VM_FAULT_REFILL);
            uint32_t file = fault.offset < ends[0] ? FIRST : fault.offset < ends[1] ? SECOND : THIRD;
            assert(fault.arg <= DISK / CLUSTER);
            if (file != THIRD) {
                vm_pool_add(engine, file, next[file], 3, 0);
                next[file] += 3 * CLUSTER;
            }
            vm_answer(engine, fault.id, file == THIRD ? -EROFS : 0);
        }
    }
    int result = job->result;
    free(job);
    return result;
}

static void one_write_across_two_zones(void)
{
    set_up();
    assert(pager(issue(VM_OP_WRITE, MIB, 2 * MIB, buffer, 0)) == 0);
    struct job *job = issue(VM_OP_READ, MIB, 2 * MIB, back, 0);
    assert(pager(job) == 0);
    assert(memcmp(buffer, back, 2 * MIB) == 0);
    struct vm_dirty dirty[256];
    int count = vm_dirty_take(engine, dirty, 256);
    assert(count == 2 * MIB / CLUSTER);
    for (int i = 0; i < count; i++) {
        uint64_t guest = dirty[i].cluster * CLUSTER;
        assert(dirty[i].file == (guest < ends[0] ? FIRST : SECOND));
        uint8_t found;
        assert(pread(files[dirty[i].file], &found, 1, dirty[i].host_offset) == 1);
        assert(found == buffer[guest - MIB]);
    }
    vm_dirty_done(engine, 0);
    // What is left goes back, of all zones.
    struct vm_range ranges[64];
    uint32_t numbers[64];
    while ((count = vm_pool_take(engine, ranges, numbers, 64)) > 0)
        for (int i = 0; i < count; i++)
            assert(numbers[i] == FIRST || numbers[i] == SECOND);
    finish_all();
}

static void a_zone_without_clusters_fails_alone(void)
{
    set_up();
    assert(pager(issue(VM_OP_WRITE, 5 * MIB, CLUSTER, buffer, 0)) == -EROFS);
    assert(pager(issue(VM_OP_WRITE, 3 * MIB, CLUSTER, buffer, 0)) == 0);
    assert(pager(issue(VM_OP_WRITE, 4 * MIB - CLUSTER, 2 * CLUSTER, buffer, 0)) == -EROFS);
    assert(pager(issue(VM_OP_WRITE, 0, CLUSTER, buffer, 0)) == 0);
    assert(pager(issue(VM_OP_READ, 3 * MIB, CLUSTER, back, 0)) == 0);
    assert(memcmp(buffer, back, CLUSTER) == 0);
    finish_all();
}

static void zones_that_are_refused(void)
{
    struct vm_config config = {.size = DISK, .sector_size = 512, .unit_shift = 16,
                               .cluster_shift = 16, .leaf_units = LEAF_UNITS};
    create(&config);
    uint64_t unaligned[] = {CLUSTER + 512, DISK}, falling[] = {2 * CLUSTER, CLUSTER};
    assert(vm_engine_set_zones(engine, unaligned, owners, 2) == -EINVAL);
    assert(vm_engine_set_zones(engine, falling, owners, 2) == -EINVAL);
    assert(vm_engine_set_zones(engine, ends, owners, 0) == -EINVAL);
    destroy();
}

int main(void)
{
    one_write_across_two_zones();
    a_zone_without_clusters_fails_alone();
    zones_that_are_refused();
}

/* One write over units that are written in place and units that are not, of one cluster: the whole
 * cluster moves, with both parts of the write and the rest from wherever it lay. */
#include "harness.h"

enum { DISK = 2 * MIB, CLUSTER = 64 * KIB, UNIT = 4 * KIB, LEAF = 512, POOL = MIB };

static uint8_t buffer[CLUSTER], data[CLUSTER];

static void set_up(void)
{
    struct vm_config config = {.size = DISK, .sector_size = 512, .cluster_shift = 16,
                               .unit_shift = 12, .leaf_units = LEAF};
    create(&config);
    add_file(temporary(), true);
    add_file(temporary(), false);
    memset(data, 'o', CLUSTER);
    assert(pwrite(files[0], data, CLUSTER, 0) == CLUSTER);
    memset(data, 'p', CLUSTER);
    assert(pwrite(files[1], data, CLUSTER, 0) == CLUSTER);
    start_loop();
}

/* Every unit whose number has a bit in `own` lies in the top image, the others in its parent. */
static void fill(const struct vm_fault *fault, uint32_t own)
{
    uint64_t entries[LEAF] = {0};
    for (uint32_t i = 0; i < CLUSTER / UNIT; i++)
        entries[i] = (uint64_t)VM_DATA << 60 | (uint64_t)!(own >> i & 1) << 52 | i * UNIT >> 9;
    assert(vm_fill(engine, fault->id, entries, LEAF, 0) == 0);
}

static void write_over(uint32_t own, uint64_t start, uint64_t end)
{
    set_up();
    memset(data, 'w', CLUSTER);
    struct job *job = issue(VM_OP_WRITE, start, end - start, data, 0);
    begin();
    struct vm_fault fault = expect(VM_FAULT_FILL);
    fill(&fault, own);
    fault = expect(VM_FAULT_REFILL);
    assert(vm_pool_add(engine, 0, POOL, 4, 0) == 0);
    vm_answer(engine, fault.id, 0);
    assert(result_of(job) == 0);
    assert(vm_io(engine, VM_OP_READ, 0, CLUSTER, buffer, 0) == 0);
    for (uint64_t at = 0; at < CLUSTER; at += 512) {
        uint8_t old = own >> at / UNIT & 1 ? 'o' : 'p';
        assert(all_bytes(buffer + at, 512, start <= at && at < end ? 'w' : old));
    }
    finish_all();
}

int main(void)
{
    write_over(0x00ff, 6 * UNIT, 10 * UNIT);          // from its own into its parent's
    write_over(0xff00, 6 * UNIT, 10 * UNIT);          // and the other way
    write_over(0x5555, UNIT / 2, CLUSTER - UNIT / 2);  // to and fro
    write_over(0x0001, 512, 2 * UNIT + 512);
    return 0;
}

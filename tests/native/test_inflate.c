/* A cluster that could not be inflated: an error for who still needs it, for nobody else. */
#include "harness.h"

enum { DISK = 2 * MIB, CLUSTER = 64 * KIB, LEAF = 32 };

static uint8_t buffer[2 * CLUSTER], data[CLUSTER];

static struct vm_fault asked_for(struct job *job)
{
    struct vm_fault fault = expect(VM_FAULT_INFLATE);
    assert(job && fault.offset == 0 && fault.arg == 1);
    return fault;
}

static struct job *start_read(uint64_t length)
{
    struct vm_config config = {.size = DISK, .sector_size = 512, .cluster_shift = 16,
                               .unit_shift = 16, .leaf_units = LEAF};
    create(&config);
    add_file(temporary(), true);
    start_loop();
    struct job *job = issue(VM_OP_READ, 0, length, buffer, 0);
    struct vm_fault fault = expect(VM_FAULT_FILL);
    fill_alike(&fault, LEAF, CLUSTER, VM_COMPRESSED, 1);
    return job;
}

static void test_who_still_needs_it_fails(void)
{
    struct job *job = start_read(CLUSTER);
    struct vm_fault fault = asked_for(job);
    assert(vm_inflated(engine, fault.id, 0, NULL, 0, -EBADMSG) == 0);
    assert(result_of(job) == -EBADMSG);
    // The next one asks again, and may be luckier.
    job = issue(VM_OP_READ, 0, CLUSTER, buffer, 0);
    fault = asked_for(job);
    memset(data, 'd', CLUSTER);
    assert(vm_inflated(engine, fault.id, 0, data, CLUSTER, 0) == 0);
    assert(result_of(job) == 0 && all_bytes(buffer, CLUSTER, 'd'));
    finish_all();
}

static void test_who_finds_other_data_there_goes_on(void)
{
    struct job *job = start_read(2 * CLUSTER);
    struct vm_fault fault = asked_for(job);
    memset(data, 'w', CLUSTER);
    struct job *write = issue(VM_OP_WRITE, 0, CLUSTER, data, 0);
    begin();
    struct vm_fault refill = expect(VM_FAULT_REFILL);
    assert(vm_pool_add(engine, 0, MIB, 4, 0) == 0);
    vm_answer(engine, refill.id, 0);
    assert(result_of(write) == 0);
    assert(vm_inflated(engine, fault.id, 0, NULL, 0, -EBADMSG) == 0);
    fault = expect(VM_FAULT_INFLATE);
    assert(fault.offset == CLUSTER);
    memset(data, 'd', CLUSTER);
    assert(vm_inflated(engine, fault.id, CLUSTER, data, CLUSTER, 0) == 0);
    assert(result_of(job) == 0);
    assert(all_bytes(buffer, CLUSTER, 'w') && all_bytes(buffer + CLUSTER, CLUSTER, 'd'));
    finish_all();
}

int main(void)
{
    test_who_still_needs_it_fails();
    test_who_finds_other_data_there_goes_on();
    return 0;
}

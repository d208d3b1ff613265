/* The engine stopped under load, many times, by several threads: every request ends, with ESHUTDOWN
 * or as it would have, the Pager learns of it, and what is asked afterwards is answered too. */
#include "harness.h"

enum { UNIT = 4 * KIB, CLUSTER = 64 * KIB, LEAF_UNITS = 256, DISK = 8 * MIB, USERS = 4 };

static uint64_t next_host;
static uint64_t done_count;

static uint64_t random_of(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void commit(void)
{
    struct vm_dirty dirty[64];
    int count;
    while ((count = vm_dirty_take(engine, dirty, 64)) > 0)
        vm_dirty_done(engine, 0);
    assert(count == 0);
}

static void *pager(void *unused)
{
    struct vm_fault fault;
    uint8_t data[CLUSTER];
    int count;
    memset(data, 1, sizeof data);
    while ((count = vm_faults_wait(engine, &fault, 1, -1)) == 1) {
        switch (fault.type) {
        case VM_FAULT_FILL:
            fill_alike(&fault, LEAF_UNITS, UNIT, fault.offset % (2 * MIB) ? VM_COMPRESSED : VM_ABSENT, 1);
            break;
        case VM_FAULT_INFLATE:
            vm_inflated(engine, fault.id, fault.offset / CLUSTER * CLUSTER, data, CLUSTER, 0);
            break;
        case VM_FAULT_REFILL:
            vm_pool_add(engine, 0, next_host, 4, 0);
            next_host += 4 * CLUSTER;
            vm_answer(engine, fault.id, 0);
            break;
        case VM_FAULT_FLUSH:
        case VM_FAULT_DISCARD:
        case VM_FAULT_ZERO:
            commit();
            vm_drain(engine);
            // fall through
        default:
            vm_answer(engine, fault.id, 0);
        }
    }
    assert(count == -ESHUTDOWN);
    commit();  // what was written to the end
    return unused;
}

static void *user(void *argument)
{
    uint64_t seed = 88172645463325252ull + (uintptr_t)argument * 7919;
    uint8_t *data = calloc(1, 256 * KIB);
    int error = 0;
    while (!error) {
        static const uint8_t ops[] = {VM_OP_READ, VM_OP_WRITE, VM_OP_WRITE, VM_OP_FLUSH,
                                      VM_OP_DISCARD, VM_OP_WRITE_ZEROES};
        uint32_t op = ops[random_of(&seed) % sizeof ops];
        uint64_t length = (1 + random_of(&seed) % 512) * 512;
        uint64_t offset = random_of(&seed) % ((DISK - length) / 512) * 512;
        if (op == VM_OP_FLUSH)
            offset = length = 0;
        error = vm_io(engine, op, offset, length, data, random_of(&seed) % 8 ? 0 : VM_IO_FUA);
        __atomic_fetch_add(&done_count, 1, __ATOMIC_RELAXED);
    }
    assert(error == -ESHUTDOWN);
    free(data);
    return NULL;
}

static void *stop(void *unused)
{
    vm_engine_stop(engine);
    return unused;
}

static void run(uint64_t requests, uint32_t flags)
{
    pthread_t pager_thread, users[USERS], stopper;
    struct vm_config config = {.size = DISK, .sector_size = 512, .unit_shift = 12,
                               .cluster_shift = 16, .leaf_units = LEAF_UNITS, .map_bytes = 16 * KIB,
                               .flags = VM_CAN_ZERO | VM_CAN_DISCARD | flags};
    create(&config);
    add_file(temporary(), true);
    add_file(temporary(), false);
    next_host = MIB;
    done_count = 0;
    start_loop();
    pthread_create(&pager_thread, NULL, pager, NULL);
    for (uintptr_t i = 0; i < USERS; i++)
        pthread_create(&users[i], NULL, user, (void *)i);
    while (__atomic_load_n(&done_count, __ATOMIC_RELAXED) < requests)
        sched_yield();
    pthread_create(&stopper, NULL, stop, NULL);
    vm_engine_stop(engine);
    for (int i = 0; i < 100; i++)
        stats();
    for (int i = 0; i < USERS; i++)
        pthread_join(users[i], NULL);
    pthread_join(pager_thread, NULL);
    pthread_join(stopper, NULL);
    join_loop();
    struct vm_stats now = stats();
    assert(now.in_flight == 0 && now.dirty == 0 && now.failed == 0);
    struct vm_range ranges[64];
    uint32_t numbers[64];
    uint64_t left = 0;
    for (int count; (count = vm_pool_take(engine, ranges, numbers, 64));)
        while (count--)
            left += ranges[count].length / CLUSTER;
    assert(left == now.pool && stats().pool == 0);
    destroy();
}

static void test_never_run(void)
{
    struct vm_config config = {.size = DISK, .sector_size = 512, .unit_shift = 12,
                               .cluster_shift = 16, .leaf_units = LEAF_UNITS};
    create(&config);
    vm_pool_add(engine, 0, MIB, 4, 0);
    vm_engine_stop(engine);
    destroy();
}

static void test_stopped_before_it_ran(void)
{
    struct vm_config config = {.size = DISK, .sector_size = 512, .unit_shift = 12,
                               .cluster_shift = 16, .leaf_units = LEAF_UNITS};
    uint8_t data[512];
    create(&config);
    vm_engine_stop(engine);
    struct job *job = issue(VM_OP_READ, 0, 512, data, 0);
    start_loop();
    assert(result_of(job) == -ESHUTDOWN);
    join_loop();
    assert(vm_drain(engine) == 0 && vm_ublk_serve(engine, 0, 1, 4096, 1) == -ESHUTDOWN);
    destroy();
}

int main(void)
{
    for (uint64_t i = 0; i < 24; i++)
        run(i * i * 4, i % 3 ? 0 : VM_WRITETHROUGH);
    test_never_run();
    test_stopped_before_it_ran();
    return 0;
}

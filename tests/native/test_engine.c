/* The whole engine against a shadow: a pager in C serves a toy format, several threads write, read,
 * discard and zero at random, and every read is compared.  Run under ASan+UBSan and TSan.
 *
 * Toy format: cluster c of the top image lies at table[c] (0: absent, 1: zero) of one sparse file;
 * absent clusters show the parent, which is every third cluster compressed (made up by the pager),
 * every third a flat file, and the rest nothing. */
#define _GNU_SOURCE
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine.h"

enum { THREADS = 4, LEAF_UNITS = 256 };

static uint32_t unit_shift, cluster_shift;
static uint64_t disk_size, clusters, rounds;
static uint64_t *table;     /* the toy format's, pager thread only */
static uint64_t next_host;
static uint8_t *shadow;
static struct vm_engine *engine;
static int top_fd, parent_fd;
static bool fail_some;

static uint64_t random_of(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static uint8_t parent_byte(uint64_t offset) { return (offset >> 9) * 31 + offset % 251 + 1; }

static void fill(const struct vm_fault *fault)
{
    uint64_t entries[LEAF_UNITS] = {0};
    for (uint64_t i = 0; i < LEAF_UNITS; i++) {
        uint64_t guest = fault->offset + (i << unit_shift);
        uint64_t cluster = guest >> cluster_shift;
        if (guest >= disk_size)
            break;
        uint64_t within = guest - (cluster << cluster_shift);
        if (table[cluster] > 1)
            entries[i] = (uint64_t)VM_DATA << 60 | 0ull << 52 | (table[cluster] + within) >> 9;
        else if (table[cluster] == 1)
            entries[i] = (uint64_t)VM_ZERO << 60;
        else if (cluster % 3 == 0)
            entries[i] = (uint64_t)VM_COMPRESSED << 60 | 1ull << 52;
        else if (cluster % 3 == 1)
            entries[i] = (uint64_t)VM_DATA << 60 | 1ull << 52 | guest >> 9;
    }
    assert(vm_fill(engine, fault->id, entries, LEAF_UNITS, 0) == 0);
}

static void inflate(const struct vm_fault *fault)
{
    uint64_t size = 1ull << cluster_shift;
    uint64_t start = fault->offset & ~(size - 1);
    uint8_t *data = malloc(size);
    for (uint64_t i = 0; i < size; i++)
        data[i] = parent_byte(start + i);
    assert(fault->arg == 1);
    assert(vm_inflated(engine, fault->id, start, data, size, 0) == 0);
    free(data);
}

static void commit(void)
{
    struct vm_dirty dirty[1024];
    int count;
    while ((count = vm_dirty_take(engine, dirty, 1024)) > 0) {
        for (int i = 0; i < count; i++) {
            assert(i == 0 || dirty[i].cluster > dirty[i - 1].cluster);
            table[dirty[i].cluster] = dirty[i].host_offset;
        }
        vm_dirty_done(engine, 0);
    }
    assert(count == 0);
}

static void zero(const struct vm_fault *fault)
{
    commit();
    vm_drain(engine);
    uint64_t size = 1ull << cluster_shift;
    assert(fault->offset % size == 0 && fault->length);
    for (uint64_t at = fault->offset; at < fault->offset + fault->length; at += size)
        table[at >> cluster_shift] = 1;
    vm_answer(engine, fault->id, 0);
}

static void *pager(void *unused)
{
    struct vm_fault faults[16];
    uint64_t refills = 0;
    int count;
    while ((count = vm_faults_wait(engine, faults, 16, 50)) >= 0) {
        for (int i = 0; i < count; i++) {
            switch (faults[i].type) {
            case VM_FAULT_FILL:
                fill(&faults[i]);
                break;
            case VM_FAULT_INFLATE:
                inflate(&faults[i]);
                break;
            case VM_FAULT_REFILL:
                if (fail_some && ++refills % 3 == 0) {
                    vm_answer(engine, faults[i].id, -ENOSPC);
                    break;
                }
                vm_pool_add(engine, 0, next_host, faults[i].arg + 3, 0);
                next_host += (faults[i].arg + 3) << cluster_shift;
                // A gap, so that the pool is not one run for ever.
                vm_pool_add(engine, 0, next_host + (1ull << cluster_shift), 2, 1);
                next_host += 3ull << cluster_shift;
                vm_answer(engine, faults[i].id, 0);
                break;
            case VM_FAULT_FLUSH:
                commit();
                fdatasync(top_fd);
                vm_answer(engine, faults[i].id, 0);
                break;
            case VM_FAULT_DISCARD:
            case VM_FAULT_ZERO:
                zero(&faults[i]);
                break;
            case VM_FAULT_BEGIN:
                vm_answer(engine, faults[i].id, 0);
                break;
            default:
                assert(!"unexpected fault");
            }
        }
        if (!count)
            commit();
    }
    return unused;
}

static void *loop(void *unused)
{
    assert(vm_engine_run(engine) == 0);
    return unused;
}

/* Threads own interleaved stripes that are not cluster aligned, so that they share clusters. */
static void *user(void *argument)
{
    uint64_t self = (uint64_t)(uintptr_t)argument;
    uint64_t seed = 88172645463325252ull + self * 7919;
    uint64_t stripe = 24 * 512;
    uint8_t *data = malloc(stripe);
    for (uint64_t round = 0; round < rounds; round++) {
        uint64_t stripes = disk_size / stripe / THREADS;
        uint64_t base = (random_of(&seed) % stripes * THREADS + self) * stripe;
        uint64_t first = random_of(&seed) % 24, count = 1 + random_of(&seed) % (24 - first);
        uint64_t at = base + first * 512, length = count * 512;
        int error = 0;
        switch (random_of(&seed) % 8) {
        case 0: case 1: case 2:
            memset(data, (int)random_of(&seed), length);
            error = vm_io(engine, VM_OP_WRITE, at, length, data, 0);
            if (!error)
                memcpy(shadow + at, data, length);
            break;
        case 3:
            error = vm_io(engine, VM_OP_WRITE_ZEROES, at, length, NULL,
                          random_of(&seed) % 2 ? VM_IO_NOUNMAP : 0);
            if (!error)
                memset(shadow + at, 0, length);
            break;
        case 4:
            if (random_of(&seed) % 4 == 0)
                error = vm_io(engine, VM_OP_FLUSH, 0, 0, NULL, 0);
            break;
        default:
            error = vm_io(engine, VM_OP_READ, at, length, data, 0);
            assert(!error);
            assert(!memcmp(data, shadow + at, length));
        }
        // A write that failed for want of space may have been done in part: put it right.
        if (error) {
            assert(fail_some && error == -ENOSPC);
            do
                error = vm_io(engine, VM_OP_WRITE, at, length, memset(data, 0, length), 0);
            while (error == -ENOSPC);
            assert(!error);
            memset(shadow + at, 0, length);
        }
    }
    free(data);
    return NULL;
}

static void compare_all(void)
{
    uint8_t *data = malloc(disk_size);
    assert(!vm_io(engine, VM_OP_READ, 0, disk_size, data, 0));
    for (uint64_t i = 0; i < disk_size; i++)
        if (data[i] != shadow[i]) {
            fprintf(stderr, "byte %llu: %u, expected %u\n", (unsigned long long)i, data[i], shadow[i]);
            abort();
        }
    free(data);
}

static void run(uint32_t unit, uint32_t cluster, uint32_t flags, bool failing)
{
    char top_name[] = "/tmp/vm-top-XXXXXX", parent_name[] = "/tmp/vm-parent-XXXXXX";
    pthread_t threads[THREADS], loop_thread, pager_thread;
    unit_shift = unit;
    cluster_shift = cluster;
    fail_some = failing;
    disk_size = 12u << 20;
    disk_size += 512 * 5;
    clusters = (disk_size >> cluster) + 1;
    table = calloc(clusters, sizeof *table);
    shadow = calloc(1, disk_size);
    next_host = 1 << 20;
    top_fd = mkstemp(top_name);
    parent_fd = mkstemp(parent_name);
    unlink(top_name);
    unlink(parent_name);
    for (uint64_t c = 0; c < clusters; c++)
        for (uint64_t i = c << cluster; c % 3 != 2 && i < (c + 1) << cluster && i < disk_size; i++)
            shadow[i] = parent_byte(i);
    assert(pwrite(parent_fd, shadow, disk_size, 0) == (ssize_t)disk_size);
    struct vm_config config = {.size = disk_size, .sector_size = 512, .unit_shift = unit,
                               .cluster_shift = cluster, .leaf_units = LEAF_UNITS, .flags = flags,
                               .map_bytes = 16 << 10};
    while ((uint64_t)config.leaf_units << unit < 1u << 20)
        assert(!"leaf too small");
    assert(vm_engine_create(&config, &engine) == 0);
    assert(vm_engine_add_file(engine, top_fd, -1, 0, 1) == 0);
    assert(vm_engine_add_file(engine, parent_fd, -1, 0, 0) == 1);
    pthread_create(&loop_thread, NULL, loop, NULL);
    pthread_create(&pager_thread, NULL, pager, NULL);
    compare_all();
    for (uint64_t i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, user, (void *)(uintptr_t)i);
    for (uint64_t i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    compare_all();
    assert(!vm_io(engine, VM_OP_FLUSH, 0, 0, NULL, 0));
    assert(!vm_io(engine, VM_OP_DISCARD, 0, disk_size, NULL, 0));
    if (flags & VM_CAN_DISCARD)
        memset(shadow, 0, disk_size);
    compare_all();
    struct vm_stats stats;
    vm_stats(engine, &stats);
    assert(stats.in_flight == 0 && stats.failed == 0);
    vm_engine_stop(engine);
    pthread_join(loop_thread, NULL);
    pthread_join(pager_thread, NULL);
    assert(vm_io(engine, VM_OP_READ, 0, 512, shadow, 0) == -ESHUTDOWN);
    vm_engine_destroy(engine);
    close(top_fd);
    close(parent_fd);
    free(table);
    free(shadow);
    printf("unit 2^%u cluster 2^%u flags %u failing %d: %llu allocations, %llu copies\n", unit,
           cluster, flags, failing, (unsigned long long)stats.allocations,
           (unsigned long long)stats.copies);
}

int main(int argc, char **argv)
{
    rounds = argc > 1 ? strtoull(argv[1], NULL, 10) : 2000;
    run(12, 16, VM_CAN_ZERO | VM_CAN_DISCARD, false);
    run(16, 16, VM_CAN_ZERO | VM_CAN_DISCARD, true);
    run(12, 12, VM_CAN_ZERO | VM_CAN_DISCARD, false);
    run(12, 20, 0, false);
    run(14, 19, VM_WRITETHROUGH | VM_CAN_ZERO, false);
    return 0;
}

/* vm_decode against an obvious implementation: random layouts and entries, among them what a hostile
 * table would hold.  The arrays are exactly as long as told, so that AddressSanitizer sees a step
 * too far. */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"

static uint64_t seed = 88172645463325252ull;

static uint64_t rnd(uint64_t below)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return below ? (seed >> 11) % below : seed;
}

static uint64_t pick(const uint64_t *values, size_t count) { return values[rnd(count)]; }
#define PICK(...) pick((const uint64_t[]){__VA_ARGS__}, \
                       sizeof (const uint64_t[]){__VA_ARGS__} / sizeof(uint64_t))

struct table {
    struct vm_layout layout;
    uint8_t *raw;
    uint64_t raw_count, unit, repeat, skip, limit, unit_count;
    uint32_t source, layer;
    struct vm_range *forbidden;
    uint64_t forbidden_count;
};

static uint64_t entry_of(const struct table *table, uint64_t i)
{
    uint64_t entry = 0;
    for (uint32_t byte = 0; byte < table->layout.width; byte++) {
        uint32_t shift = table->layout.big_endian ? table->layout.width - 1 - byte : byte;
        entry |= (uint64_t)table->raw[i * table->layout.width + byte] << (8 * shift);
    }
    return entry;
}

/* The map entry of unit j of the cluster that entry i is about. */
static uint64_t obvious(const struct table *table, uint64_t i, uint64_t j)
{
    const struct vm_layout *layout = &table->layout;
    uint64_t entry = entry_of(table, i);
    uint64_t kind = VM_DATA;
    for (int r = layout->rule_count - 1; r >= 0; r--)
        if ((entry & layout->rules[r].mask) == layout->rules[r].value)
            kind = layout->rules[r].kind;
    if (kind == VM_COMPRESSED)
        return kind << 60 | (uint64_t)table->layer << 52;
    if (kind != VM_DATA && kind != VM_SHARED)
        return kind << 60;
    unsigned __int128 product = (unsigned __int128)(entry & layout->mask) * layout->scale;
    if (product >> 64)
        return (uint64_t)VM_INVALID << 60;
    __int128 host = (__int128)product + layout->bias;
    __int128 length = (__int128)table->repeat * table->unit;
    if (host < 0 || host < layout->low || host % layout->align || host >= table->limit
        || host >= (__int128)1 << 59)
        return (uint64_t)VM_INVALID << 60;
    for (uint64_t f = 0; f < table->forbidden_count; f++) {
        const struct vm_range *range = &table->forbidden[f];
        if (range->length && host < (__int128)range->offset + range->length
            && range->offset < host + length)
            return (uint64_t)VM_INVALID << 60;
    }
    return kind << 60 | (uint64_t)table->source << 52 | (uint64_t)(host + j * table->unit) >> 9;
}

static void make_layout(struct vm_layout *layout)
{
    memset(layout, 0xff, sizeof *layout);
    layout->width = rnd(2) ? 4 : 8;
    layout->big_endian = rnd(2);
    layout->mask = PICK(UINT64_MAX, 0xffffffff, 0x00fffffffffffe00, 0xfffffffffff00000, 0, 0xf0, rnd(0));
    layout->scale = PICK(1, 512, 4096, 1 << 20, 1ull << 40, 1ull << 63, UINT64_MAX, 0, rnd(0));
    layout->bias = PICK(0, 512, -512, 4096, 100, INT64_MAX, INT64_MIN, rnd(0));
    layout->low = PICK(0, 512, 65536, 1ull << 58, UINT64_MAX);
    layout->align = PICK(512, 4096, 65536);
    layout->rule_count = rnd(6);
    for (uint32_t r = 0; r < 5; r++)
        layout->rules[r] = (struct vm_rule){PICK(UINT64_MAX, 0xffffffff, 1, 3, 0, 1ull << 62),
                                            PICK(0, 1, 2, 0xffffffff, 1ull << 62, UINT64_MAX),
                                            rnd(7), 0};
}

static void make(struct table *table)
{
    make_layout(&table->layout);
    table->unit = 512ull << rnd(8);
    table->repeat = 1ull << rnd(6);
    table->skip = rnd(3) ? 0 : rnd(table->repeat * 3);
    table->raw_count = rnd(12);
    table->unit_count = rnd(table->repeat * 13);
    table->limit = PICK(0, 4096, 1 << 20, 1ull << 32, UINT64_MAX);
    table->source = rnd(256);
    table->layer = rnd(256);
    table->raw = malloc(table->raw_count * table->layout.width + 1);
    for (uint64_t i = 0; i < table->raw_count; i++) {
        uint64_t entry = PICK(0, 1, 2, 3, rnd(64) * 512, rnd(64) * 512, rnd(1 << 20), UINT64_MAX,
                              UINT64_MAX - 511, 1ull << 62, 1ull << 63, rnd(0));
        if (table->layout.big_endian)
            entry = table->layout.width == 4 ? __builtin_bswap32(entry) : __builtin_bswap64(entry);
        memcpy(table->raw + i * table->layout.width, &entry, table->layout.width);
    }
    table->raw = realloc(table->raw, table->raw_count * table->layout.width ?: 1);
    table->forbidden_count = rnd(5);
    table->forbidden = calloc(table->forbidden_count ?: 1, sizeof *table->forbidden);
    uint64_t at = 0;
    for (uint64_t f = 0; f < table->forbidden_count; f++) {
        at += rnd(40) * 512 + 512;
        table->forbidden[f] = (struct vm_range){at, rnd(20) * 512 + 512};
        at += table->forbidden[f].length;
    }
}

static void check(const struct table *table)
{
    uint64_t units = table->unit_count ?: 1;
    uint64_t *got = calloc(units, sizeof *got), *expected = calloc(units, sizeof *expected);
    int partial = 0;
    for (uint64_t u = 0; u < table->unit_count; u++) {
        uint64_t i = (u + table->skip) / table->repeat, j = (u + table->skip) % table->repeat;
        if (rnd(8) == 0)  // an upper layer has answered
            got[u] = expected[u] = PICK(1ull << 60, 2ull << 60 | 77, 5ull << 60);
        else if (i < table->raw_count) {
            expected[u] = obvious(table, i, j);
            partial += expected[u] >> 60 == VM_PARTIAL;
        }
    }
    int result = vm_decode(&table->layout, table->raw, table->raw_count, table->source,
                           table->layer, table->unit, table->repeat, table->skip, table->limit,
                           table->forbidden, table->forbidden_count, got, table->unit_count);
    for (uint64_t u = 0; u < table->unit_count; u++)
        if (got[u] != expected[u]) {
            fprintf(stderr, "unit %llu: %#llx, expected %#llx\n", (unsigned long long)u,
                    (unsigned long long)got[u], (unsigned long long)expected[u]);
            abort();
        }
    assert(result == partial);
    free(got);
    free(expected);
}

int main(void)
{
    for (int round = 0; round < 50000; round++) {
        struct table table;
        make(&table);
        check(&table);
        free(table.raw);
        free(table.forbidden);
    }
    return 0;
}

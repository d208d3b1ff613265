/* inflated.c: found by layer and offset, bounded in bytes and number, the least used goes first. */
#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define BOUND (32u << 20)

static struct vm_engine *engine;

static void keep(uint32_t layer, uint64_t offset, uint64_t length)
{
    uint8_t *data = malloc(length);
    memset(data, layer + (offset >> 16), length);
    assert(inflated_keep(engine, layer, offset, data, length) == 0);
    free(data);
}

static bool has(uint32_t layer, uint64_t offset)
{
    const struct inflated *slot = inflated_find(engine, layer, offset);
    assert(!slot || (slot->offset <= offset && offset < slot->offset + slot->length));
    assert(!slot || slot->data[slot->length - 1] == (uint8_t)(layer + (slot->offset >> 16)));
    return slot;
}

int main(void)
{
    engine = calloc(1, sizeof *engine);
    keep(1, 1 << 16, 1 << 16);
    assert(has(1, 1 << 16) && has(1, (2 << 16) - 1));
    assert(!has(1, (1 << 16) - 1) && !has(1, 2 << 16) && !has(0, 1 << 16) && !has(2, 1 << 16));
    keep(2, 1 << 16, 1 << 16);
    keep(2, 1 << 16, 1 << 16);  // it is there
    assert(has(1, 1 << 16) && has(2, 1 << 16) && engine->inflated_bytes == 2 << 16);

    for (uint64_t i = 2; i < 1000; i++) {
        keep(1, i << 16, 1 << 16);
        assert(has(1, i << 16) && has(1, 1 << 16));  // used all the time
        assert(engine->inflated_bytes <= 64 << 16);
    }
    assert(!has(2, 1 << 16) && has(1, 999 << 16) && has(1, 960 << 16) && !has(1, 900 << 16));

    for (uint64_t i = 0; i < 100; i++) {
        keep(3, i << 21, 2 << 20);
        assert(has(3, i << 21) && engine->inflated_bytes <= BOUND);
    }
    assert(has(3, 99 << 21) && has(3, 90 << 21) && !has(3, 80 << 21));

    keep(4, 0, BOUND + 512);  // more than the bound is kept, alone
    assert(has(4, BOUND) && engine->inflated_bytes == BOUND + 512);
    keep(4, 1ull << 40, 1 << 16);
    assert(!has(4, 0) && engine->inflated_bytes == 1 << 16);
    inflated_destroy(engine);
    assert(engine->inflated_bytes == 0);
    free(engine);
    return 0;
}

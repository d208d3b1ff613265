/* Decoded clusters of compressed images, least recently used out, bounded in bytes. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

#define SLOTS (sizeof((struct vm_engine *)0)->inflated / sizeof(struct inflated))
#define MAX_BYTES (32u << 20)

const struct inflated *inflated_find(struct vm_engine *engine, uint32_t layer, uint64_t offset)
{
    for (size_t i = 0; i < SLOTS; i++) {
        struct inflated *slot = &engine->inflated[i];
        if (slot->data && slot->layer == layer && offset >= slot->offset
            && offset - slot->offset < slot->length) {
            slot->used = ++engine->inflated_clock;
            return slot;
        }
    }
    return NULL;
}

static void drop(struct vm_engine *engine, struct inflated *slot)
{
    engine->inflated_bytes -= slot->length;
    free(slot->data);
    *slot = (struct inflated){0};
}

int inflated_keep(struct vm_engine *engine, uint32_t layer, uint64_t offset, const void *data,
                  uint64_t length)
{
    if (inflated_find(engine, layer, offset))
        return 0;
    for (;;) {
        struct inflated *oldest = NULL, *unused = NULL;
        for (size_t i = 0; i < SLOTS; i++) {
            struct inflated *slot = &engine->inflated[i];
            if (!slot->data)
                unused = slot;
            else if (!oldest || slot->used < oldest->used)
                oldest = slot;
        }
        if (unused && (!oldest || engine->inflated_bytes + length <= MAX_BYTES)) {
            uint8_t *copy = malloc(length);
            if (!copy)
                return -ENOMEM;
            memcpy(copy, data, length);
            *unused = (struct inflated){offset, length, ++engine->inflated_clock, layer, copy};
            engine->inflated_bytes += length;
            return 0;
        }
        drop(engine, oldest);
    }
}

void inflated_destroy(struct vm_engine *engine)
{
    for (size_t i = 0; i < SLOTS; i++)
        if (engine->inflated[i].data)
            drop(engine, &engine->inflated[i]);
}

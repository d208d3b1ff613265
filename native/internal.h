/* The engine's own structures.  Everything here belongs to the loop thread, except what says "lock".
 *
 * Invariants
 * 1. A request is in exactly one place: the ready, parked or syncing list, waiting for its pieces, or done.
 * 2. A cluster that is being allocated has BUSY in its first map entry; its old entries stay in place
 *    until the data is written, so reads go on; writes to it wait.
 * 3. A leaf with a busy or dirty cluster is never dropped.
 * 4. An exclusive range (discard, zeroes) lets no new request in.  Its question is asked once none of
 *    its clusters is busy and no piece that was in flight is left.
 * 5. A request is never completed with fewer bytes than it asked for: all of them, or an error.
 */
#ifndef VM_INTERNAL_H
#define VM_INTERNAL_H

#include <liburing.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdbool.h>

#include "engine.h"

#define MAX_FILES 256
#define MAX_IO (1u << 20)        /* bytes of one walked request */
#define ENTRY_BUSY (1ULL << 51)
#define ENTRY_HOST ((1ULL << 51) - 1)

static inline uint32_t entry_kind(uint64_t entry) { return entry >> 60; }
static inline uint32_t entry_source(uint64_t entry) { return entry >> 52 & 0xff; }
static inline uint64_t entry_host(uint64_t entry) { return (entry & ENTRY_HOST) << 9; }
static inline uint64_t entry_make(uint32_t kind, uint32_t source, uint64_t host)
{
    return (uint64_t)kind << 60 | (uint64_t)source << 52 | host >> 9;
}
static inline bool entry_reads_zero(uint64_t entry) { return entry_kind(entry) <= VM_ZERO; }

struct file {
    int fd, direct_fd, sync_fd; /* -1: none */
    uint32_t align;
    bool owned;
    struct cipher *cipher;  /* or NULL */
};

struct leaf {
    uint64_t index;
    uint32_t busy, dirty;   /* clusters */
    bool referenced;        /* since the eviction hand passed */
    struct leaf *prev, *next;
    uint64_t entries[];
};

struct map {
    uint64_t leaf_count, bytes, loaded;
    uint32_t leaf_shift;    /* log2 of the guest bytes of a leaf */
    uint32_t unit_shift, cluster_shift, leaf_units;
    uint64_t limit;
    struct leaf **leaves;
    struct leaf *newest, *oldest;
};

struct pool_run {
    uint64_t host, count;
    uint32_t file;
    bool reused;
};

struct pool {               /* of a zone: the guest bytes whose new clusters lie in one file */
    uint64_t end;           /* guest offset */
    uint32_t file;          /* where there are several zones */
    bool refill_asked;
    struct pool_run *runs;
    uint32_t first, count, room;
    uint64_t clusters;      /* in all runs */
    uint64_t high;          /* after the last refill */
};

struct inflated {           /* a decoded cluster of a layer, LRU */
    uint64_t offset, length, used;
    uint32_t layer;
    uint8_t *data;
};

enum origin { FROM_CALL, FROM_UBLK, FROM_COPY };
enum mover { IN_MEMORY, IN_KERNEL };   /* where the request's bytes are: buf, or registered buffer tag */
enum wait { NOT_PARKED, WAIT_LEAF, WAIT_INFLATE, WAIT_POOL, WAIT_BEGIN, WAIT_BUSY, WAIT_RANGE,
            WAIT_ANSWER, WAIT_PACE, WAIT_BUFFER, WAIT_SYNC,
            WAIT_DRAIN, WAIT_COPY };

struct request {
    struct request *next;
    struct request *next_exclusive;
    uint8_t op, origin, mover, wait;
    uint8_t step;           /* request.c, enum step */
    bool zeroes;            /* the walk writes zeros, there is no data */
    bool walked;            /* nothing more to submit in this step */
    bool prepared;          /* an IN_MEMORY request of ublk has its buffer */
    bool fua, nounmap;
    bool exclusive;         /* in the list of exclusive ranges: cursor to end */
    bool drained;           /* what was in flight before has ended */
    bool waits_for_pieces;  /* a copy's read: not before that */
    uint16_t tag;
    uint32_t pieces;        /* in flight */
    int error;
    uint64_t offset, length;
    uint64_t cursor, end;   /* of the walk: guest offsets */
    uint8_t *buf;           /* byte 0 is guest byte `offset` */
    uint64_t wait_for;      /* leaf index or fault id */
    uint64_t inflate_unit;  /* a unit that could not be inflated, */
    int inflate_error;      /* and why; 0: none */
    void *owner;            /* struct call or struct copy */
};

struct call {
    struct request request;
    sem_t done;
};

struct alloc {              /* adjacent guest clusters on adjacent host clusters, being written */
    uint64_t cluster, count, host;
    uint32_t file, parts;   /* parts: data piece, copy */
    int error;
    bool barrier;
};

struct copy {               /* the rest of a partly written cluster */
    struct request read;
    struct alloc *alloc;
    struct request *parent;
    uint64_t at[2], end[2]; /* guest ranges to copy: head, tail */
    uint64_t base;          /* guest offset of the cluster */
    uint32_t part;
    uint32_t room;
    bool waits;             /* the first read, for pieces in flight */
    uint8_t *buf;
};

enum piece_op { PIECE_READ, PIECE_WRITE, PIECE_ZERO, PIECE_SYNC };

struct piece {
    struct piece *next;
    struct request *request;
    struct alloc *alloc;
    struct copy *copy;
    uint8_t op, mover, epoch;
    bool direct, refused;   /* goes to the O_DIRECT descriptor; which would not have it */
    uint16_t file, tag;
    uint32_t length, done;  /* length: what is left */
    uint64_t host, guest;
    uint8_t *buf;           /* or, IN_KERNEL, the offset in the registered buffer */
    uint8_t *encrypted;     /* what is written instead of buf, or NULL */
    int error;              /* it is not even tried */
};

struct fault {
    struct fault *next;
    struct vm_fault ask;
    struct request *request; /* FLUSH, DISCARD, ZERO */
};

enum command_op { DO_IO, DO_FILL, DO_INFLATED, DO_POOL_ADD, DO_POOL_TAKE, DO_ANSWER, DO_DIRTY_TAKE,
                  DO_DIRTY_DONE, DO_DRAIN, DO_FAILED, DO_STATS, DO_SERVE, DO_STOP };

struct command {
    struct command *next;
    enum command_op op;
    bool waits;             /* the caller waits on done; else the command is freed */
    sem_t done;
    int result;
    uint64_t id, offset, length;
    uint32_t file, count, flags;
    int error;
    void *data;
    void *data2;
};

#define BUFFER_CLASSES 9    /* 4 KiB << class, to 1 MiB */

struct ublk {
    int fd;
    bool serving, stopping;
    uint32_t depth, max_io, mode;
    uint32_t aborted;
    const void *descriptors;
    size_t descriptors_size;
    struct request *requests;
    struct buffer { struct buffer *next; } *free[BUFFER_CLASSES];
    uint64_t buffer_bytes;
};

struct request_list { struct request *first, *last; };

struct vm_engine {
    struct vm_config config;
    struct file files[MAX_FILES];
    uint32_t file_count;
    int zero_fd, event_fd;
    uint64_t event_value;

    struct io_uring ring;
    struct map map;
    struct pool *pools;     /* by zone, in the order of the disk; at least one */
    uint32_t pool_count;
    struct inflated inflated[64];
    uint64_t inflated_bytes, inflated_clock;
    struct ublk ublk;

    struct request_list ready, parked;
    struct request_list syncing;    /* what the round of syncs that runs is for */
    uint32_t sync_pieces;
    bool sync_wanted;
    struct request *exclusive;  /* ranges that wait for DISCARD or ZERO to be asked and answered */
    struct piece *free_pieces;
    uint64_t flying[2];     /* pieces, by epoch */
    uint8_t epoch;
    bool draining, drain_wanted;    /* a round runs; another one is to follow */
    uint64_t drain_round;
    struct command *drains;

    struct vm_dirty *dirty, *committing;
    uint32_t dirty_count, dirty_room, committing_count;
    uint64_t copy_bytes;    /* buffers of all copies */
    uint64_t requests;      /* not done */
    bool begun, begin_asked, stopping;
    bool encrypts;          /* the top image's files */
    int failed;
    uint8_t *zeros;         /* MAX_IO of them */
    struct fault *asked;    /* not answered */
    uint64_t next_id;
    struct vm_stats stats;

    pthread_mutex_t lock;   /* the rest */
    pthread_cond_t faults_ready;
    struct command *commands, *commands_last;
    struct fault *faults, *faults_last;
    enum { NEW, RUNNING, ENDED } life;
};

/* Written where it is; nothing is allocated for it. */
static inline bool entry_in_place(const struct vm_engine *engine, uint64_t entry)
{
    return entry_kind(entry) == VM_DATA && engine->files[entry_source(entry)].owned;
}

/* map.c */
int map_create(struct map *map, const struct vm_config *config);
void map_destroy(struct map *map);
static inline struct leaf *map_leaf(struct map *map, uint64_t offset)
{
    struct leaf *leaf = map->leaves[offset >> map->leaf_shift];
    if (leaf)
        leaf->referenced = true;
    return leaf;
}
static inline uint64_t *map_entry(struct map *map, struct leaf *leaf, uint64_t offset)
{
    return leaf->entries + (offset >> map->unit_shift & (map->leaf_units - 1));
}
int map_install(struct map *map, uint64_t index, const uint64_t *entries);
/* Every unit of the range is loaded and reads as zeros. */
bool map_range_reads_zero(struct map *map, uint64_t offset, uint64_t end);
bool map_range_busy(struct map *map, uint64_t offset, uint64_t end);
void map_set_zero(struct map *map, uint64_t offset, uint64_t end);
/* Let cluster's entries point at host and clear BUSY. */
void map_publish(struct map *map, uint64_t cluster, uint32_t file, uint64_t host);

/* pool.c */
/* The number of the zone that a guest offset lies in. */
uint32_t pool_at(const struct vm_engine *engine, uint64_t offset);
/* The pool that clusters of a file go to. */
struct pool *pool_of(struct vm_engine *engine, uint32_t file);
bool pool_take(struct pool *pool, uint32_t cluster_shift, struct pool_run *ret);
int pool_add(struct pool *pool, uint32_t cluster_shift, uint32_t file, uint64_t host, uint64_t count,
             bool reused);
uint32_t pool_take_runs(struct pool *pool, uint32_t cluster_shift, struct vm_range *ret,
                        uint32_t *ret_files, uint32_t max);

/* inflated.c */
const struct inflated *inflated_find(struct vm_engine *engine, uint32_t layer, uint64_t offset);
int inflated_keep(struct vm_engine *engine, uint32_t layer, uint64_t offset, const void *data,
                  uint64_t length);
void inflated_destroy(struct vm_engine *engine);

/* cipher.c */
int cipher_create(const struct vm_cipher *config, struct cipher **ret);
void cipher_destroy(struct cipher *cipher);
/* length: whole sectors.  ret may be from.  0 or -EIO. */
int cipher_run(const struct cipher *cipher, bool encrypt, uint64_t host, uint64_t guest,
               const uint8_t *from, uint64_t length, uint8_t *ret);

/* fault.c */
uint64_t fault_ask(struct vm_engine *engine, uint32_t type, uint64_t offset, uint64_t length,
                   uint64_t arg, struct request *request);
void fault_tell(struct vm_engine *engine, uint32_t type, uint64_t offset, uint64_t length,
                uint64_t arg);
struct fault *fault_take(struct vm_engine *engine, uint64_t id);
struct fault *fault_find(struct vm_engine *engine, uint32_t type, uint64_t offset);

/* piece.c */
struct piece *piece_new(struct vm_engine *engine, uint8_t op);
void piece_submit(struct vm_engine *engine, struct piece *piece);
void piece_done(struct vm_engine *engine, struct piece *piece, int result);
struct io_uring_sqe *next_sqe(struct vm_engine *engine);

/* drain.c */
/* Park request, or keep command waiting, until no piece that is in flight now is. */
void drain_request(struct vm_engine *engine, struct request *request);
void drain_command(struct vm_engine *engine, struct command *command);
void drain_check(struct vm_engine *engine);

/* sync.c */
/* Park request until what is written now is durable. */
void sync_ask(struct vm_engine *engine, struct request *request);
/* Begin a round if one is wanted and none runs. */
void sync_round(struct vm_engine *engine);
void sync_piece_done(struct vm_engine *engine, int error);

/* request.c */
void request_start(struct vm_engine *engine, struct request *request);
void request_run(struct vm_engine *engine, struct request *request);
/* One of the request's pieces (or its copy) ended. */
void request_piece_done(struct vm_engine *engine, struct request *request, int error);
void request_park(struct vm_engine *engine, struct request *request, enum wait wait, uint64_t wait_for);
/* Let those that wait for this run again, or with error != 0 fail. */
void requests_wake(struct vm_engine *engine, enum wait wait, uint64_t wait_for, int error);
/* Take them out instead: the caller runs or ends them. */
struct request_list requests_take(struct vm_engine *engine, enum wait wait, uint64_t wait_for);
/* End it with error as soon as its pieces have ended.  It is in no list. */
void request_fail(struct vm_engine *engine, struct request *request, int error);
void request_answered(struct vm_engine *engine, struct request *request, int error);
void requests_fail_parked(struct vm_engine *engine, int error);
void list_push(struct request_list *list, struct request *request);
struct request *list_pop(struct request_list *list);
/* Add length bytes at the request's cursor to *open, or submit *open and start a new piece. */
struct piece *walk_piece(struct vm_engine *engine, struct request *request, struct piece **open,
                         uint8_t op, uint32_t file, uint64_t host, uint64_t length);
void walk_submit(struct vm_engine *engine, struct piece **open);

/* alloc.c */
/* Give the cluster at the request's cursor a host cluster and write the part up to part_end.
 * false: the request was parked. */
bool alloc_cluster(struct vm_engine *engine, struct request *request, struct leaf *leaf,
                   struct piece **open, uint64_t part_end);
void alloc_part_done(struct vm_engine *engine, struct alloc *alloc, int error);
void copy_read_done(struct vm_engine *engine, struct copy *copy, int error);
void copy_write_done(struct vm_engine *engine, struct copy *copy, int error);
int dirty_take(struct vm_engine *engine, struct vm_dirty *ret, uint32_t max);
void dirty_done(struct vm_engine *engine, int error);
void engine_fail(struct vm_engine *engine, int error);

/* ublk.c */
int ublk_serve(struct vm_engine *engine, int fd, uint32_t depth, uint32_t max_io, uint32_t mode);
void ublk_cqe(struct vm_engine *engine, uint16_t tag, int result);
/* Give an IN_MEMORY request its buffer and data.  false: it was parked or has failed. */
bool ublk_prepare(struct vm_engine *engine, struct request *request);
void ublk_complete(struct vm_engine *engine, struct request *request);
/* Copy bytes into a READ request that lives in the kernel. */
int ublk_put(struct vm_engine *engine, struct request *request, uint64_t at, const void *data,
             uint64_t length);
void ublk_close(struct vm_engine *engine);

#endif

/* The boundary between Python and the engine: the only declaration of it.  cffi reads the part
 * between the CDEF marks, the C files and C tests include the whole.
 *
 * The engine moves bytes and knows offsets.  One loop thread owns the map, the pool and the ring;
 * every other call posts to it or waits for it, from any thread, and none calls back into Python.
 * Results are 0 or a count, or -errno.  Offsets and lengths are bytes.
 *
 * unit     the piece of guest space that one map entry describes; a power of two, 512 or more
 * cluster  what the top image allocates; a power of two, a multiple of the unit
 * leaf     leaf_units consecutive entries, loaded together; a multiple of the cluster
 */
#ifndef VM_ENGINE_H
#define VM_ENGINE_H

#include <stddef.h>
#include <stdint.h>

/* CDEF */

enum vm_kind {  /* virtmount/image.py, Kind, has the same numbers */
    VM_ABSENT = 0,  /* while filling: not answered yet; in the map: zeros */
    VM_ZERO = 1,
    VM_DATA = 2,
    VM_SHARED = 3,
    VM_COMPRESSED = 4,
    VM_PARTIAL = 5,  /* only between decode and Python; never in the map */
    VM_INVALID = 6
};

/* One map entry: kind in bits 60-63, source in bits 52-59, host offset / 512 in bits 0-50.
 * Bit 51 is the engine's own.  The source is a file number, or for COMPRESSED a layer number. */

struct vm_rule {
    uint64_t mask, value;
    uint32_t kind, reserved;
};

struct vm_layout {  /* virtmount/image.py, Layout */
    uint32_t width;  /* 4 or 8 */
    uint32_t big_endian;
    uint64_t mask, scale;
    int64_t bias;
    uint64_t low;
    uint64_t align;  /* a power of two, 512 or more */
    uint32_t rule_count, reserved;
    struct vm_rule rules[5];
};

struct vm_range {
    uint64_t offset, length;
};

/* Decode count table entries into unit entries, filling only those still ABSENT (top layer first).
 * raw points at the entry of the cluster that holds ret[0] or begins inside it: entry i of raw
 * describes units [i * repeat - skip, (i + 1) * repeat - skip) of ret, clipped to unit_count.
 * For SHARED and DATA, unit j of a cluster lies j * unit bytes after the cluster's host offset.
 * limit: a cluster whose first host byte is at or past it is INVALID.  forbidden: sorted ranges
 * that no cluster may touch.  A parent's DATA is stored as is: the file's number says that it is
 * not the top image's.  Returns how many PARTIAL units were met (left in ret for Python). */
int vm_decode(const struct vm_layout *layout, const void *raw, uint64_t raw_count, uint32_t source,
              uint32_t layer, uint64_t unit, uint64_t repeat, uint64_t skip, uint64_t limit,
              const struct vm_range *forbidden, uint64_t forbidden_count, uint64_t *ret,
              uint64_t unit_count);

enum vm_flag {
    VM_READ_ONLY = 1,
    VM_WRITETHROUGH = 2,  /* every write is durable before it is acknowledged */
    VM_CAN_ZERO = 4,      /* whole clusters can be made to read as zeros: ZERO faults are answered */
    VM_CAN_DISCARD = 8,   /* DISCARD faults are answered; without it a discard does nothing */
    VM_FLAT = 16,         /* no map: guest byte b is byte flat_offset + b of file flat_file */
    VM_IDENTITY = 32      /* a new cluster lies at its guest offset of file identity_file: no pool */
};

struct vm_config {
    uint64_t size;  /* of the guest disk; a multiple of sector_size */
    uint64_t flat_offset;
    uint32_t sector_size;
    uint32_t unit_shift, cluster_shift;
    uint32_t leaf_units;  /* a power of two, at least one cluster and at least 1 MiB / unit + 1 */
    uint32_t flags;  /* enum vm_flag */
    uint32_t flat_file;
    uint64_t map_bytes;  /* clean leaves are dropped above this; 0: 64 MiB */
    uint32_t identity_file, reserved;
};

enum vm_cipher_mode {
    VM_CIPHER_XTS = 1,  /* AES-XTS, keys of 32 or 64 bytes */
    VM_CIPHER_CBC = 2   /* AES-CBC, keys of 16, 24 or 32 bytes */
};

struct vm_cipher {  /* virtmount/image.py, Cipher */
    uint32_t mode;
    uint32_t key_length;
    uint32_t essiv;
    uint32_t by_guest;
    uint64_t origin;
    uint8_t key[64];
};

struct vm_engine;

int vm_engine_create(const struct vm_config *config, struct vm_engine **ret);
/* Everything must have stopped: vm_engine_run has returned or was never called, and no other call is
 * under way.  Files stay open. */
void vm_engine_destroy(struct vm_engine *engine);
/* fd: buffered descriptor.  direct_fd: the same file with O_DIRECT, or -1; used for pieces whose
 * offset and length are multiples of direct_align.  owned: the top image's, may be written in place.
 * Before vm_engine_run only.  Returns the file's number, at most 255. */
int vm_engine_add_file(struct vm_engine *engine, int fd, int direct_fd, uint32_t direct_align,
                       int owned);
/* What is read from file is decrypted, what is written to it encrypted, sector by sector.  Before
 * vm_engine_run only.  Such a file must not be served with VM_UBLK_AUTO_BUF. */
int vm_engine_set_cipher(struct vm_engine *engine, uint32_t file, const struct vm_cipher *cipher);
/* The disk consists of zones, in order; new clusters of each lie in a file of its own.  ends: guest
 * offsets, multiples of the cluster, the last one of no importance.  Before vm_engine_run only. */
int vm_engine_set_zones(struct vm_engine *engine, const uint64_t *ends, const uint32_t *files,
                        uint32_t count);
/* The loop, on the calling thread, until vm_engine_stop.  0 or -errno of the ring's creation. */
int vm_engine_run(struct vm_engine *engine);
/* Ask the loop to end.  Requests that wait for an answer fail with ESHUTDOWN, pieces in flight end. */
void vm_engine_stop(struct vm_engine *engine);

/* Questions to Python.  Each id is answered exactly once, except those marked "no answer". */
enum vm_fault_type {
    VM_FAULT_FILL = 1,     /* offset: guest offset of a leaf -> vm_fill */
    VM_FAULT_INFLATE = 2,  /* offset: guest offset of a unit, arg: layer -> vm_inflated */
    VM_FAULT_REFILL = 3,   /* arg: clusters wanted for the zone of guest offset -> vm_pool_add as often as needed, then vm_answer */
    VM_FAULT_BEGIN = 4,    /* the first write of the session waits -> vm_answer */
    VM_FAULT_FLUSH = 5,    /* make everything acknowledged so far durable -> vm_answer */
    VM_FAULT_DISCARD = 6,  /* offset, length: whole clusters, nothing else uses them until -> vm_answer */
    VM_FAULT_ZERO = 7,     /* the same, and they must read as zeros -> vm_answer; EOPNOTSUPP: the engine writes zeros */
    VM_FAULT_FAILED = 8,   /* no answer: arg = errno of a host write or sync; offset = guest offset */
    VM_FAULT_LOST = 9,     /* no answer: host cluster at offset of file arg was taken from the pool, the write failed */
    VM_FAULT_DEVICE = 10   /* no answer: the ublk device was stopped and all its requests are done */
};

struct vm_fault {
    uint64_t id;
    uint32_t type, reserved;
    uint64_t offset, length;
    uint64_t arg;
};

/* Wait for faults.  timeout_ms < 0: for ever.  Returns how many, 0 at timeout, -ESHUTDOWN once the
 * loop has ended and no fault is left. */
int vm_faults_wait(struct vm_engine *engine, struct vm_fault *ret, uint32_t max, int timeout_ms);

/* Answer FILL with leaf_units entries, or error = -errno: waiting requests fail, the leaf stays unknown. */
int vm_fill(struct vm_engine *engine, uint64_t id, const uint64_t *entries, uint32_t count, int error);
/* Answer INFLATE with the bytes of guest range [offset, offset + length), copied, or error: requests
 * that still find the unit compressed fail with it. */
int vm_inflated(struct vm_engine *engine, uint64_t id, uint64_t offset, const void *data,
                uint64_t length, int error);
/* count adjacent host clusters that read as zeros, from host_offset of file; reused: held data before. */
int vm_pool_add(struct vm_engine *engine, uint32_t file, uint64_t host_offset, uint64_t count, int reused);
/* Answer REFILL, BEGIN, FLUSH, DISCARD, ZERO.  error: 0 or -errno for the waiting requests.  After a
 * DISCARD or ZERO with error 0 the range reads as zeros. */
int vm_answer(struct vm_engine *engine, uint64_t id, int error);

struct vm_dirty {
    uint64_t cluster, host_offset;
    uint32_t file, barrier;
};

/* Take up to max new mappings, sorted by cluster; they count as being committed until vm_dirty_done.
 * Call only when none is.  Returns the count. */
int vm_dirty_take(struct vm_engine *engine, struct vm_dirty *ret, uint32_t max);
/* They are durable (error 0), or will never be: then the engine refuses every later write and flush
 * with error. */
int vm_dirty_done(struct vm_engine *engine, int error);
/* Return when every host request that was in flight at the call has ended. */
int vm_drain(struct vm_engine *engine);
/* Take the pool back, run by run.  Returns the count, 0 when empty. */
int vm_pool_take(struct vm_engine *engine, struct vm_range *ret, uint32_t *ret_files, uint32_t max);
/* Every later write and flush fails with error (negative). */
int vm_set_failed(struct vm_engine *engine, int error);

enum vm_op {  /* the numbers of ublk */
    VM_OP_READ = 0,
    VM_OP_WRITE = 1,
    VM_OP_FLUSH = 2,
    VM_OP_DISCARD = 3,
    VM_OP_WRITE_ZEROES = 5
};

enum vm_io_flag {
    VM_IO_FUA = 1,
    VM_IO_NOUNMAP = 2
};

/* One request from any thread but the loop's and the Pager's; returns when it is done: 0 or -errno.
 * READ and WRITE: any offset and length inside the disk that are multiples of 512. */
int vm_io(struct vm_engine *engine, uint32_t op, uint64_t offset, uint64_t length, void *data,
          uint32_t flags);

struct vm_stats {
    uint64_t reads, writes, flushes, discards;
    uint64_t read_bytes, written_bytes;
    uint64_t host_reads, host_writes, host_syncs;
    uint64_t allocations, copies;          /* clusters */
    uint64_t faults[11];                   /* by type; [0]: all */
    uint64_t leaves, leaf_bytes, dirty, pool;  /* now */
    uint64_t in_flight;                    /* requests, now */
    int32_t failed, reserved;              /* -errno, or 0 */
};

int vm_stats(struct vm_engine *engine, struct vm_stats *ret);

/* ublk.  mode: what the kernel granted at ADD_DEV. */
enum vm_ublk_mode {
    VM_UBLK_USER_COPY = 1,
    VM_UBLK_AUTO_BUF = 2  /* AUTO_BUF_REG + SUPPORT_ZERO_COPY + USER_COPY */
};

/* Serve queue 0 of the device behind cdev_fd (an open /dev/ublkcN, which the engine closes when
 * the device is gone or at destroy).  Returns when every FETCH is with the kernel: START_DEV may follow. */
int vm_ublk_serve(struct vm_engine *engine, int cdev_fd, uint32_t depth, uint32_t max_io,
                  uint32_t mode);

/* One control command: payload is struct ublksrv_ctrl_cmd (32 bytes) and is updated from nothing;
 * what the kernel returns lies behind its addr field.  Blocks.  control_fd: /dev/ublk-control. */
int vm_ublk_control(int control_fd, uint32_t cmd_op, void *payload);

/* END CDEF */

#endif

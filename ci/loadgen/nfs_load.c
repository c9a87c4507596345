/*
 * NFS load generator on libnfs' asynchronous API.
 *
 * Keeps a fixed number of READ or WRITE requests in flight on one file over one TCP connection, and
 * prints one JSON object: how many were answered, how fast, how late. Both sides of a comparison are
 * driven by this same program, so whatever it costs itself is paid on both sides.
 *
 *   nfs_load URL MODE REQUEST_BYTES DEPTH SECONDS FILE_BYTES [PASS]
 *
 * URL            directory and file, nfs://SERVER/EXPORT/FILE
 * MODE           fill      write the file once from end to end, COMMIT, and stop (SECONDS is ignored)
 *                write     sequential writes, wrapping at FILE_BYTES, for SECONDS, COMMIT at the end
 *                read      sequential reads, wrapping
 *                randread  reads at random multiples of REQUEST_BYTES
 *                syncfill  like fill, every WRITE FILE_SYNC; each piece is made from its offset, and each acknowledged
 *                          offset is printed on a line of its own before the report
 *                verify    reads the offsets given on standard input and compares them with what syncfill writes
 * PASS           a number from which syncfill makes its pieces too (0): of another pass they are others
 *
 * The time runs from the first request to the last reply, of `fill` and `write` to the reply of COMMIT. Bounds: DEPTH at
 * most MAX_DEPTH, latencies of at most MAX_SAMPLES requests, and the run ends at the first error.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <time.h>

#include <nfsc/libnfs.h>

#define MAX_DEPTH 256
#define MAX_SAMPLES (16u << 20)
/* A server that answers nothing for this long has failed the run. */
#define STALL_MS 30000

enum mode { FILL, WRITE, READ, RANDREAD, SYNCFILL, VERIFY, MODES };

struct slot {
    struct load *load;
    uint64_t started_ns, offset;
    char *data;
};

struct load {
    struct nfs_context *nfs;
    struct nfsfh *file;
    enum mode mode;
    uint64_t request_bytes, file_bytes;
    uint64_t next_offset, end_ns, random, pass;
    char *data;
    unsigned in_flight;
    uint64_t operations, bytes;
    uint32_t *latency_us;
    uint64_t samples, capacity;
    unsigned errors;
    int stop;
};

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void fail(const char *what, const char *why) {
    fprintf(stderr, "nfs_load: %s: %s\n", what, why);
    exit(1);
}

static uint64_t random_u64(struct load *l) {
    uint64_t x = l->random;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return l->random = x;
}

/* What syncfill writes at an offset: no two words of a file are the same. */
static void make_piece(const struct load *l, uint64_t offset, char *data) {
    for (uint64_t i = 0; i + 8 <= l->request_bytes; i += 8) {
        uint64_t word = (offset + i + (l->pass << 40)) * 0x9e3779b97f4a7c15u ^ 0x4f7574726967u;
        memcpy(data + i, &word, 8);
    }
}

static void record(struct load *l, uint64_t ns) {
    if (l->samples == MAX_SAMPLES)
        return;
    if (l->samples == l->capacity) {
        l->capacity = l->capacity ? l->capacity * 2 : 1u << 16;
        l->latency_us = realloc(l->latency_us, l->capacity * sizeof *l->latency_us);
        if (!l->latency_us)
            fail("memory", strerror(errno));
    }
    l->latency_us[l->samples++] = (uint32_t)(ns / 1000);
}

static void submit(struct slot *s);

static void answered(int status, struct nfs_context *nfs, void *data, void *private_data) {
    struct slot *s = private_data;
    struct load *l = s->load;
    uint64_t now = now_ns();

    l->in_flight--;
    if (status < 0) {
        if (!l->errors++)
            fprintf(stderr, "nfs_load: request failed: %s\n", data ? (char *)data : nfs_get_error(nfs));
        l->stop = 1;
        return;
    }
    if ((uint64_t)status != l->request_bytes) {
        if (!l->errors++)
            fprintf(stderr, "nfs_load: asked for %llu bytes, got %d\n", (unsigned long long)l->request_bytes, status);
        l->stop = 1;
        return;
    }
    if (l->mode == SYNCFILL) {
        printf("%llu\n", (unsigned long long)s->offset);
        fflush(stdout);
    } else if (l->mode == VERIFY) {
        make_piece(l, s->offset, s->data);
        if (memcmp(s->data, data, l->request_bytes)) {
            fprintf(stderr, "nfs_load: the bytes at %llu are not those written\n", (unsigned long long)s->offset);
            l->errors++;
        }
    }
    record(l, now - s->started_ns);
    l->operations++;
    l->bytes += (uint64_t)status;
    if (l->mode != FILL && l->mode != SYNCFILL && l->mode != VERIFY && now >= l->end_ns)
        l->stop = 1;
    if (!l->stop)
        submit(s);
}

static void submit(struct slot *s) {
    struct load *l = s->load;
    uint64_t offset;
    int rc;

    if (l->mode == RANDREAD) {
        offset = random_u64(l) % (l->file_bytes / l->request_bytes) * l->request_bytes;
    } else if (l->mode == VERIFY) {
        unsigned long long given;
        if (scanf("%llu", &given) != 1) {
            l->stop = 1;
            return;
        }
        offset = given;
    } else {
        if (l->next_offset + l->request_bytes > l->file_bytes) {
            if (l->mode == FILL || l->mode == SYNCFILL) {
                l->stop = 1;
                return;
            }
            l->next_offset = 0;
        }
        offset = l->next_offset;
        l->next_offset += l->request_bytes;
    }
    s->offset = offset;
    if (l->mode == SYNCFILL)
        make_piece(l, offset, s->data);
    s->started_ns = now_ns();
    if (l->mode == FILL || l->mode == WRITE || l->mode == SYNCFILL)
        rc = nfs_pwrite_async(l->nfs, l->file, offset, l->request_bytes, l->mode == SYNCFILL ? s->data : l->data, answered,
                              s);
    else
        rc = nfs_pread_async(l->nfs, l->file, offset, l->request_bytes, answered, s);
    if (rc)
        fail("cannot send", nfs_get_error(l->nfs));
    l->in_flight++;
}

static int by_value(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static uint32_t percentile(const struct load *l, unsigned percent) {
    return l->samples ? l->latency_us[(l->samples - 1) * percent / 100] : 0;
}

int main(int argc, char **argv) {
    static const char *const modes[] = {"fill", "write", "read", "randread", "syncfill", "verify"};
    static struct slot slots[MAX_DEPTH];
    struct load l = {0};
    struct nfs_url *url;
    struct rusage usage;
    uint64_t begin, end, last_reply, answered_before;
    unsigned depth, i;
    double seconds;

    if (argc != 7 && argc != 8)
        fail("usage", "nfs_load URL fill|write|read|randread|syncfill|verify REQUEST_BYTES DEPTH SECONDS FILE_BYTES [PASS]");
    for (i = 0; i < MODES && strcmp(argv[2], modes[i]); i++)
        ;
    if (i == MODES)
        fail("MODE", argv[2]);
    l.mode = (enum mode)i;
    l.request_bytes = strtoull(argv[3], NULL, 10);
    depth = (unsigned)strtoul(argv[4], NULL, 10);
    seconds = strtod(argv[5], NULL);
    l.file_bytes = strtoull(argv[6], NULL, 10);
    l.pass = argc == 8 ? strtoull(argv[7], NULL, 10) : 0;
    if (!l.request_bytes || l.request_bytes > 1 << 20 || l.file_bytes < l.request_bytes)
        fail("REQUEST_BYTES", "must be 1 to 1048576 and at most FILE_BYTES");
    if (!depth || depth > MAX_DEPTH)
        fail("DEPTH", "must be 1 to 256");
    l.random = now_ns() | 1;

    l.nfs = nfs_init_context();
    if (!l.nfs)
        fail("libnfs", "no context");
    /* The default reads 1 MiB ahead per file with a page cache: off, so that a request is a request. */
    nfs_set_readahead(l.nfs, 0);
    nfs_set_pagecache(l.nfs, 0);
    nfs_set_autoreconnect(l.nfs, 0);
    url = nfs_parse_url_full(l.nfs, argv[1]);
    if (!url)
        fail(argv[1], nfs_get_error(l.nfs));
    if (nfs_mount(l.nfs, url->server, url->path))
        fail("mount", nfs_get_error(l.nfs));
    if (nfs_get_readmax(l.nfs) < l.request_bytes || nfs_get_writemax(l.nfs) < l.request_bytes)
        fprintf(stderr, "nfs_load: the server takes at most %llu/%llu bytes a READ/WRITE: requests are split\n",
                (unsigned long long)nfs_get_readmax(l.nfs), (unsigned long long)nfs_get_writemax(l.nfs));
    if (l.mode == FILL || l.mode == WRITE || l.mode == SYNCFILL) {
        int flags = O_RDWR | (l.mode == SYNCFILL ? O_SYNC : 0);
        if (nfs_open(l.nfs, url->file, flags, &l.file)) {
            if (nfs_creat(l.nfs, url->file, 0644, &l.file))
                fail("create", nfs_get_error(l.nfs));
            nfs_close(l.nfs, l.file);
            if (nfs_open(l.nfs, url->file, flags, &l.file))
                fail("open", nfs_get_error(l.nfs));
        }
    } else if (nfs_open(l.nfs, url->file, O_RDONLY, &l.file)) {
        fail("open", nfs_get_error(l.nfs));
    }
    l.data = malloc(l.request_bytes);
    if (!l.data)
        fail("memory", strerror(errno));
    for (i = 0; i + 8 <= l.request_bytes; i += 8) {
        uint64_t r = random_u64(&l);
        memcpy(l.data + i, &r, 8);
    }

    begin = last_reply = now_ns();
    l.end_ns = begin + (uint64_t)(seconds * 1e9);
    for (i = 0; i < depth && !l.stop; i++) {
        slots[i].load = &l;
        slots[i].data = malloc(l.request_bytes);
        if (!slots[i].data)
            fail("memory", strerror(errno));
        submit(&slots[i]);
    }
    answered_before = 0;
    while (l.in_flight) {
        struct pollfd p = {.fd = nfs_get_fd(l.nfs), .events = (short)nfs_which_events(l.nfs)};
        int ready = poll(&p, 1, 1000);
        if (ready < 0 && errno != EINTR)
            fail("poll", strerror(errno));
        if (ready > 0 && nfs_service(l.nfs, p.revents) < 0)
            fail("connection", nfs_get_error(l.nfs));
        if (l.operations != answered_before) {
            answered_before = l.operations;
            last_reply = now_ns();
        } else if (now_ns() - last_reply > (uint64_t)STALL_MS * 1000000u) {
            fail("server", "no reply for 30 s");
        }
    }
    if (!l.errors && (l.mode == FILL || l.mode == WRITE) && nfs_fsync(l.nfs, l.file))
        fail("commit", nfs_get_error(l.nfs));
    end = now_ns();
    seconds = (double)(end - begin) / 1e9;
    getrusage(RUSAGE_SELF, &usage);
    qsort(l.latency_us, l.samples, sizeof *l.latency_us, by_value);
    printf("{\"operations\":%llu,\"seconds\":%.3f,\"iops\":%.1f,\"mb_s\":%.2f,\"p50_us\":%u,\"p99_us\":%u,\"max_us\":%u,"
           "\"client_cpu_us\":%llu,\"errors\":%u}\n",
           (unsigned long long)l.operations, seconds, (double)l.operations / seconds, (double)l.bytes / 1e6 / seconds,
           percentile(&l, 50), percentile(&l, 99), percentile(&l, 100),
           (unsigned long long)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000u +
               (unsigned long long)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec),
           l.errors);
    nfs_close(l.nfs, l.file);
    nfs_destroy_url(url);
    nfs_destroy_context(l.nfs);
    return l.errors ? 1 : 0;
}

/* Bench serving: a client that costs next to nothing, and a server that does nothing (the floor).
 *
 *   loadgen ask  WHERE REQUEST [-p http|frames] [-c connections] [-t seconds] [-n requests] [-r per_second]
 *                [-w warm_up_requests] [-e EXPECTED]
 *   loadgen echo WHERE BYTES
 *
 * WHERE is host:port, or the path of a Unix socket. REQUEST is a file with the bytes of one request, which is sent again
 * and again on connections that are kept alive. EXPECTED has a line for each version that may answer: its digest, and
 * text that its answer to this request must hold.
 *
 * Rules:
 * - one thread; the next request of a connection is sent when its answer is whole (closed loop), or, with -r, at its
 *   time on the clock, whether answers are late or not, and measured from that time (open loop, one connection);
 * - an answer counts only if it is whole and of status 200 (a frame: without `code`);
 * - SIGTERM ends a run early, with its figures;
 * - figures are one line of JSON on stdout; times in microseconds.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { SUB = 128, SUB_BITS = 7, BUCKETS = 64 * SUB, DIGEST = 64, VERSIONS = 16 };

typedef struct {
    int fd;
    char *in;       /* what has arrived of the answer */
    size_t have, room;
    size_t sent;    /* bytes of the request that are out */
    size_t whole;   /* length of the whole answer, once it is known */
    uint64_t asked; /* when */
} Connection;

static struct {
    uint64_t answers, errors, reconnects, warm_up;
    uint64_t begun, least, most;
    double sum;
    uint64_t hist[BUCKETS];
} seen;

static struct {
    char digest[DIGEST + 1];
    char text[256];
    uint64_t answers;
} versions[VERSIONS];
static int version_count;
static int current = -1;       /* the version that answered last */
static uint64_t current_since; /* when it first did */
static uint64_t switches, unknown, mixed;

static const char *where;
static int frames;
static char *request;
static size_t request_length;
static volatile sig_atomic_t stop;

static void on_signal(int number) { (void)number; stop = 1; }

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
    fprintf(stderr, "loadgen: %s: %s\n", what, strerror(errno));
    exit(2);
}

/* Histogram: 128 steps to each doubling, so that a figure is known to less than one percent. */
static int bucket(uint64_t ns) {
    if (ns < SUB) return (int)ns;
    int top = 63 - __builtin_clzll(ns);
    return (top - SUB_BITS + 1) * SUB + (int)((ns >> (top - SUB_BITS)) & (SUB - 1));
}

static double middle(int b) {
    if (b < SUB) return b;
    int shift = b / SUB - 1;
    uint64_t low = ((uint64_t)(SUB + b % SUB)) << shift;
    return (double)low + (double)((uint64_t)1 << shift) / 2;
}

static double quantile(double q) {
    uint64_t rank = (uint64_t)(q * (double)seen.answers), sum = 0;
    for (int b = 0; b < BUCKETS; b++) {
        sum += seen.hist[b];
        if (sum > rank) return middle(b) / 1000;
    }
    return (double)seen.most / 1000;
}

static int open_socket(int listening) {
    int fd, one = 1;
    if (where[0] == '/') {
        struct sockaddr_un a = {.sun_family = AF_UNIX};
        strncpy(a.sun_path, where, sizeof a.sun_path - 1);
        if ((fd = socket(AF_UNIX, SOCK_STREAM, 0)) < 0) die("socket");
        if (listening) unlink(where);
        if ((listening ? bind : connect)(fd, (struct sockaddr *)&a, sizeof a) < 0) die(where);
    } else {
        char host[64];
        const char *colon = strrchr(where, ':');
        struct sockaddr_in a = {.sin_family = AF_INET};
        if (!colon || colon - where >= (long)sizeof host) { errno = EINVAL; die(where); }
        snprintf(host, sizeof host, "%.*s", (int)(colon - where), where);
        a.sin_port = htons((uint16_t)atoi(colon + 1));
        if (inet_pton(AF_INET, host, &a.sin_addr) != 1) { errno = EINVAL; die(where); }
        if ((fd = socket(AF_INET, SOCK_STREAM, 0)) < 0) die("socket");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if ((listening ? bind : connect)(fd, (struct sockaddr *)&a, sizeof a) < 0) die(where);
    }
    if (listening && listen(fd, 64) < 0) die("listen");
    return fd;
}

/* The length of the whole answer; 0 while that can't be told. */
static size_t length_of(Connection *c, int *status) {
    if (frames) {
        uint32_t n;
        if (c->have < 4) return 0;
        memcpy(&n, c->in, 4);
        return 4 + (size_t)n;
    }
    char *end = memmem(c->in, c->have, "\r\n\r\n", 4);
    if (!end) return 0;
    size_t head = (size_t)(end - c->in) + 4;
    *status = c->have > 12 ? atoi(c->in + 9) : 0;
    *end = 0;
    char *field = strcasestr(c->in, "\ncontent-length:");
    size_t whole = 0;
    if (field) {
        whole = head + strtoul(field + 16, NULL, 10);
    } else if (strcasestr(c->in, "\ntransfer-encoding:")) {
        if (c->have >= head + 5 && !memcmp(c->in + c->have - 5, "0\r\n\r\n", 5)) whole = c->have;
    } else {
        whole = head;
    }
    *end = '\r';
    return whole;
}

static void note_version(Connection *c, uint64_t at) {
    static const char mark[] = "\"digest\":\"";
    c->in[c->have] = 0;
    char *found = memmem(c->in, c->have, mark, sizeof mark - 1);
    int which = -1;
    if (found)
        for (int v = 0; v < version_count; v++)
            if (!strncmp(found + sizeof mark - 1, versions[v].digest, DIGEST)) which = v;
    if (which < 0) { unknown++; return; }
    versions[which].answers++;
    if (!memmem(c->in, c->have, versions[which].text, strlen(versions[which].text))) mixed++;
    /* What was asked before the last switch was seen may be answered by either; what was asked later, only by the new
     * one, or the newer: each change seen in those is one more switch, and more switches than were ordered are stale. */
    if (current < 0 || (which != current && c->asked > current_since)) {
        if (current >= 0) switches++;
        current = which;
        current_since = at;
    }
}

static void answered(Connection *c, int status) {
    uint64_t at = now(), took = at - c->asked;
    int good = frames ? !memmem(c->in, c->have < 64 ? c->have : 64, "\xa4" "code", 5) : status == 200;
    if (!good) {
        if (!seen.errors++) {
            fprintf(stderr, "loadgen: the first refusal: ");
            fwrite(c->in, 1, c->have < 600 ? c->have : 600, stderr);
            fputc('\n', stderr);
        }
    } else if (seen.warm_up) {
        if (!--seen.warm_up) seen.begun = at;
    } else {
        seen.answers++;
        seen.hist[bucket(took)]++;
        seen.sum += (double)took;
        if (took > seen.most) seen.most = took;
        if (!seen.least || took < seen.least) seen.least = took;
    }
    if (version_count) note_version(c, at);
}

static void reconnect(Connection *c, int blocking) {
    if (c->fd >= 0) { close(c->fd); seen.reconnects++; }
    c->fd = open_socket(0);
    if (!blocking) fcntl(c->fd, F_SETFL, O_NONBLOCK);
    c->have = 0;
}

/* Read what is there: 1 when the answer is whole, 0 when more must come, -1 when the connection has ended. */
static int take(Connection *c) {
    int status = 0;
    if (c->have + 65536 > c->room) {
        c->room = c->room ? 2 * c->room : 131072;
        if (!(c->in = realloc(c->in, c->room + 1))) die("memory");
    }
    ssize_t n = recv(c->fd, c->in + c->have, c->room - c->have, 0);
    if (n < 0) return errno == EAGAIN || errno == EINTR ? 0 : -1;
    if (n == 0) return -1;
    c->have += (size_t)n;
    if (!c->whole) c->whole = length_of(c, &status);
    else if (!frames) status = atoi(c->in + 9);
    if (!c->whole || c->have < c->whole) return 0;
    answered(c, status);
    return 1;
}

static void begin(Connection *c) { c->have = c->sent = c->whole = 0; }

static int push(Connection *c) {
    while (c->sent < request_length) {
        ssize_t n = send(c->fd, request + c->sent, request_length - c->sent, MSG_NOSIGNAL);
        if (n < 0) return errno == EAGAIN || errno == EINTR ? 0 : -1;
        c->sent += (size_t)n;
    }
    return 1;
}

/* One connection needs no epoll. */
static void alone(uint64_t nanoseconds, uint64_t count, double rate) {
    Connection c = {.fd = -1};
    reconnect(&c, 1);
    uint64_t n = 0, first = now();
    seen.begun = first;
    while (!stop && (!count || seen.answers < count) && (seen.warm_up || now() - seen.begun < nanoseconds)) {
        begin(&c);
        c.asked = now();
        if (rate > 0) {
            uint64_t due = first + (uint64_t)((double)n++ * 1e9 / rate);
            struct timespec t = {(time_t)(due / 1000000000u), (long)(due % 1000000000u)};
            while (!stop && clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) == EINTR) {}
            c.asked = due;
        }
        int got = push(&c) < 0 ? -1 : 0;
        while (got == 0 && !stop) got = take(&c);
        if (got < 0) { seen.errors++; reconnect(&c, 1); }
    }
}

static void ask_again(Connection *c) {
    begin(c);
    c->asked = now();
    if (push(c) < 0) { seen.errors++; reconnect(c, 0); }
}

static void together(int count_of, uint64_t nanoseconds, uint64_t count) {
    Connection *all = calloc((size_t)count_of, sizeof *all);
    int poll = epoll_create1(0);
    struct epoll_event events[256];
    if (!all || poll < 0) die("epoll");
    seen.begun = now();
    for (int i = 0; i < count_of; i++) {
        all[i].fd = -1;
        reconnect(&all[i], 0);
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = &all[i]};
        if (epoll_ctl(poll, EPOLL_CTL_ADD, all[i].fd, &e) < 0) die("epoll_ctl");
        ask_again(&all[i]);
    }
    int under_way = count_of;
    uint64_t ended = 0; /* when the last request was sent; what is under way is waited for, so that it counts */
    while (under_way && (!ended || now() - ended < 5000000000u)) {
        int n = epoll_wait(poll, events, 256, 100);
        if (!ended && (stop || (count && seen.answers >= count) || (!seen.warm_up && now() - seen.begun > nanoseconds)))
            ended = now();
        for (int i = 0; i < n; i++) {
            Connection *c = events[i].data.ptr;
            if (c->sent < request_length) push(c); /* a large request that did not fit at once */
            int got = take(c);
            if (got == 1 && !ended) ask_again(c);
            if (got && ended) {
                under_way--;
                epoll_ctl(poll, EPOLL_CTL_DEL, c->fd, NULL);
            } else if (got < 0) {
                seen.errors++;
                reconnect(c, 0);
                struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
                if (epoll_ctl(poll, EPOLL_CTL_ADD, c->fd, &e) < 0) die("epoll_ctl");
                ask_again(c);
            }
        }
    }
}

static void tell(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    double cpu = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec)
               + 1e-6 * (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
    double seconds = (double)(now() - seen.begun) / 1e9, mean = seen.answers ? seen.sum / (double)seen.answers / 1000 : 0;
    printf("{\"requests\":%lu,\"errors\":%lu,\"reconnects\":%lu,\"seconds\":%.6f,\"client_cpu\":%.6f,"
           "\"mean\":%.3f,\"least\":%.3f,\"p50\":%.3f,\"p90\":%.3f,\"p99\":%.3f,\"p999\":%.3f,\"most\":%.3f",
           seen.answers, seen.errors, seen.reconnects, seconds, cpu, mean, (double)seen.least / 1000,
           quantile(0.5), quantile(0.9), quantile(0.99), quantile(0.999), (double)seen.most / 1000);
    if (version_count) {
        printf(",\"switches\":%lu,\"mixed\":%lu,\"unknown\":%lu,\"by_version\":[", switches, mixed, unknown);
        for (int v = 0; v < version_count; v++) printf("%s%lu", v ? "," : "", versions[v].answers);
        printf("]");
    }
    printf("}\n");
}

static void read_request(const char *path) {
    struct stat s;
    FILE *f = fopen(path, "rb");
    if (!f || fstat(fileno(f), &s) < 0) die(path);
    request_length = (size_t)s.st_size;
    request = malloc(request_length);
    if (!request || fread(request, 1, request_length, f) != request_length) die(path);
    fclose(f);
}

static void read_expected(const char *path) {
    FILE *f = fopen(path, "r");
    if (!f) die(path);
    while (version_count < VERSIONS
           && fscanf(f, "%64s %255[^\n]", versions[version_count].digest, versions[version_count].text) == 2)
        version_count++;
    fclose(f);
}

/* Answers whatever it reads with the same bytes: what a socket costs, and nothing else. */
static void echo(size_t bytes) {
    char in[65536], *out;
    int listener = open_socket(1), poll = epoll_create1(0), one = 1;
    struct epoll_event events[256], e = {.events = EPOLLIN, .data.fd = listener};
    if (asprintf(&out, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%0*d", bytes,
                 (int)bytes, 0) < 0) die("memory");
    size_t length = strlen(out);
    if (poll < 0 || epoll_ctl(poll, EPOLL_CTL_ADD, listener, &e) < 0) die("epoll");
    while (!stop) {
        int n = epoll_wait(poll, events, 256, 1000);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                if ((fd = accept(listener, NULL, NULL)) < 0) continue;
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                e = (struct epoll_event){.events = EPOLLIN, .data.fd = fd};
                epoll_ctl(poll, EPOLL_CTL_ADD, fd, &e);
            } else if (recv(fd, in, sizeof in, 0) <= 0 || send(fd, out, length, MSG_NOSIGNAL) < 0) {
                close(fd);
            }
        }
    }
}

int main(int argc, char **argv) {
    int connections = 1, option;
    double seconds = 3600 * 24, rate = 0;
    uint64_t count = 0;
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    if (argc < 4) { errno = EINVAL; die("usage: loadgen ask|echo WHERE REQUEST|BYTES [options]"); }
    where = argv[2];
    if (!strcmp(argv[1], "echo")) { echo((size_t)atol(argv[3])); return 0; }
    read_request(argv[3]);
    optind = 4;
    while ((option = getopt(argc, argv, "p:c:t:n:r:w:e:")) != -1) {
        switch (option) {
        case 'p': frames = !strcmp(optarg, "frames"); break;
        case 'c': connections = atoi(optarg); break;
        case 't': seconds = atof(optarg); break;
        case 'n': count = strtoull(optarg, NULL, 10); break;
        case 'r': rate = atof(optarg); break;
        case 'w': seen.warm_up = strtoull(optarg, NULL, 10); break;
        case 'e': read_expected(optarg); break;
        default: return 2;
        }
    }
    if (connections == 1) alone((uint64_t)(seconds * 1e9), count, rate);
    else together(connections, (uint64_t)(seconds * 1e9), count);
    tell();
    return 0;
}

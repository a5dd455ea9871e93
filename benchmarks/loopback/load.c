/* A load generator for HTTP/1.1 keep-alive, one thread.
 *
 *     load PORT HEAD BODIES CONNECTIONS WARM_MS MEASURE_MS GAP_US STAGGER_US
 *
 * HEAD is a file with the request line and the headers, CRLF after each; Content-Length is added here. BODIES is a
 * file with one body a line, sent in turn. GAP_US 0 is a closed loop: each connection sends its next request when its
 * last one was answered, and connection i begins i * STAGGER_US late. GAP_US > 0 is an open loop: a request is due
 * every GAP_US; one that finds no idle connection waits for it, and its time runs from when it was due.
 *
 * After WARM_MS + MEASURE_MS nothing new is sent and what is on its way is awaited, at most DRAIN_MS; what is cut off
 * then counts as failed. Every request, warm-up included, leaves one record on stdout; `struct record` is its layout,
 * in the machine's byte order.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 128, READ_AT_ONCE = 262144, LONGEST_HEAD = 16384, DRAIN_MS = 15000 };

struct record {
    int64_t due, first, end; /* ns, 0 = start of the measured window */
    int32_t status;          /* of HTTP; 0: the connection failed or the answer was not whole */
    int32_t events;          /* server-sent events with data, [DONE] apart */
    int32_t finished;        /* 1: [DONE] was seen */
    int32_t bytes;           /* of the body */
};

enum state { HEAD, PLAIN_BODY, SIZE_LINE, CHUNK, CHUNK_END, TRAILER };

struct line {
    int fd;
    bool busy, close_after, event_stream;
    enum state state;
    int64_t left;           /* bytes of the body or of the chunk; -1: until the peer closes */
    int64_t not_before;     /* of the first request */
    size_t head_used, trailer_used;
    char head[LONGEST_HEAD + 1];
    char start[16];         /* of the SSE line that is being read */
    size_t start_used;
    struct record record;
};

static int port, poller, line_count, busy_count;
static struct line *lines;
static char **requests;
static size_t *request_sizes, request_count, next_request;
static struct record *records;
static size_t record_count, record_room;
static int64_t epoch;

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void *need(void *memory)
{
    if (!memory)
        abort();
    return memory;
}

/* ---- what is sent ---- */

static void read_requests(const char *head_path, const char *bodies_path)
{
    char head[LONGEST_HEAD], *body = NULL;
    size_t room = 0;
    FILE *file = fopen(head_path, "rb");
    size_t head_size = file ? fread(head, 1, sizeof head - 1, file) : 0;
    head[head_size] = 0;
    FILE *bodies = fopen(bodies_path, "rb");
    if (!head_size || !bodies) {
        perror("load: requests");
        exit(2);
    }
    fclose(file);
    for (ssize_t n; (n = getline(&body, &room, bodies)) > 1;) {
        char *request;
        int size = asprintf(&request, "%sContent-Length: %zd\r\n\r\n%.*s", head, n - 1, (int)(n - 1), body);
        if (size < 0)
            abort();
        requests = need(realloc(requests, (request_count + 1) * sizeof *requests));
        request_sizes = need(realloc(request_sizes, (request_count + 1) * sizeof *request_sizes));
        requests[request_count] = request;
        request_sizes[request_count++] = (size_t)size;
    }
    fclose(bodies);
    free(body);
    if (!request_count) {
        fprintf(stderr, "load: no bodies\n");
        exit(2);
    }
}

static bool connect_line(struct line *l)
{
    int one = 1;
    struct sockaddr_in there = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    l->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(l->fd, (struct sockaddr *)&there, sizeof there)) {
        close(l->fd);
        l->fd = -1;
        return false;
    }
    setsockopt(l->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = l};
    epoll_ctl(poller, EPOLL_CTL_ADD, l->fd, &event);
    return true;
}

static void disconnect_line(struct line *l)
{
    if (l->fd >= 0)
        close(l->fd);
    l->fd = -1;
}

static void finish(struct line *l, bool whole)
{
    l->record.end = now() - epoch;
    if (!whole)
        l->record.status = 0;
    if (!l->record.first)
        l->record.first = l->record.end;
    if (record_count == record_room) {
        record_room = record_room ? record_room * 2 : 65536;
        records = need(realloc(records, record_room * sizeof *records));
    }
    records[record_count++] = l->record;
    l->busy = false;
    busy_count--;
    if (!whole || l->close_after)
        disconnect_line(l);
}

static void begin(struct line *l, int64_t due)
{
    l->busy = true;
    busy_count++;
    l->state = HEAD;
    l->head_used = l->start_used = l->trailer_used = 0;
    l->close_after = l->event_stream = false;
    l->record = (struct record){.due = due - epoch};
    size_t which = next_request++ % request_count, size = request_sizes[which];
    if ((l->fd < 0 && !connect_line(l)) || send(l->fd, requests[which], size, MSG_NOSIGNAL) != (ssize_t)size) {
        finish(l, false);
        usleep(1000); /* a gateway that is down must not be hammered */
    }
}

/* ---- what comes back ---- */

static void end_of_event_line(struct line *l)
{
    const char *text = l->start;
    l->start[l->start_used] = 0;
    l->start_used = 0;
    if (strncmp(text, "data:", 5))
        return;
    text += 5 + (text[5] == ' ');
    if (!strncmp(text, "[DONE]", 6)) {
        l->record.finished = 1;
        return;
    }
    l->record.events++;
    if (!l->record.first)
        l->record.first = now() - epoch;
}

static void take_events(struct line *l, const char *at, size_t n)
{
    for (const char *stop = at + n; at < stop;) {
        const char *newline = memchr(at, '\n', (size_t)(stop - at));
        size_t part = (size_t)((newline ? newline : stop) - at), keep = sizeof l->start - 1 - l->start_used;
        keep = part < keep ? part : keep;
        memcpy(l->start + l->start_used, at, keep);
        l->start_used += keep;
        at += part + (newline != NULL);
        if (newline)
            end_of_event_line(l);
    }
}

static void take_body(struct line *l, const char *at, size_t n)
{
    l->record.bytes += (int32_t)n;
    if (l->event_stream)
        take_events(l, at, n);
    else if (!l->record.first && n)
        l->record.first = now() - epoch;
}

static void take_head(struct line *l)
{
    const char *length = strcasestr(l->head, "\ncontent-length:");
    l->record.status = l->head_used > 12 ? atoi(l->head + 9) : 0;
    l->event_stream = strcasestr(l->head, "\ncontent-type: text/event-stream") != NULL;
    l->close_after = strcasestr(l->head, "\nconnection: close") != NULL;
    l->left = length ? atoll(length + 16) : -1;
    l->state = PLAIN_BODY;
    if (strcasestr(l->head, "\ntransfer-encoding: chunked")) {
        l->left = 0;
        l->state = SIZE_LINE;
    }
}

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    c |= 32;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* Takes one byte of the frame around chunks; true when it was the last of the answer. */
static bool take_frame(struct line *l, char c)
{
    switch (l->state) {
    case SIZE_LINE:
        if (c == '\n')
            l->state = l->left ? CHUNK : TRAILER;
        else if (hex_digit(c) >= 0)
            l->left = l->left * 16 + hex_digit(c);
        return false;
    case CHUNK_END:
        if (c == '\n')
            l->state = SIZE_LINE;
        return false;
    default: /* TRAILER: an empty line ends it */
        if (c == '\n' && !l->trailer_used)
            return true;
        l->trailer_used = c == '\n' ? 0 : l->trailer_used + (c != '\r');
        return false;
    }
}

/* Takes `n` bytes of an answer; true when it is whole. */
static bool take(struct line *l, const char *at, size_t n)
{
    if (l->state == HEAD) {
        size_t before = l->head_used, part = n < LONGEST_HEAD - before ? n : LONGEST_HEAD - before;
        memcpy(l->head + before, at, part);
        l->head_used += part;
        l->head[l->head_used] = 0;
        char *end = strstr(l->head, "\r\n\r\n");
        if (!end)
            return false;
        end[2] = 0;
        size_t used = (size_t)(end + 4 - l->head) - before;
        take_head(l);
        at += used;
        n -= used;
    }
    while (n || (l->state == PLAIN_BODY && l->left == 0)) {
        if (l->state == PLAIN_BODY || l->state == CHUNK) {
            size_t part = l->left >= 0 && n > (size_t)l->left ? (size_t)l->left : n;
            take_body(l, at, part);
            at += part;
            n -= part;
            if (l->left > 0)
                l->left -= (int64_t)part;
            if (l->left == 0 && l->state == PLAIN_BODY)
                return true;
            if (l->left == 0)
                l->state = CHUNK_END;
        } else {
            n--;
            if (take_frame(l, *at++))
                return true;
        }
    }
    return false;
}

static void listen_to(struct line *l)
{
    static char part[READ_AT_ONCE];
    ssize_t n = recv(l->fd, part, sizeof part, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n > 0 && l->busy) {
        if (take(l, part, (size_t)n))
            finish(l, true);
        else if (l->state == HEAD && l->head_used >= LONGEST_HEAD)
            finish(l, false);
        return;
    }
    if (l->busy)
        finish(l, n == 0 && l->state == PLAIN_BODY && l->left < 0);
    disconnect_line(l);
}

/* ---- when ---- */

/* Sends what is due; returns when to look again at the latest. */
static int64_t send_due(int64_t gap, int64_t *next_due, int64_t stop)
{
    int64_t t = now();
    if (t >= stop)
        return t + 100000000;
    if (!gap) {
        int64_t soonest = stop;
        for (int i = 0; i < line_count; i++) {
            struct line *l = &lines[i];
            if (!l->busy && l->not_before <= t)
                begin(l, now());
            else if (!l->busy && l->not_before < soonest)
                soonest = l->not_before;
        }
        return soonest;
    }
    for (int i = 0; i < line_count && *next_due <= t && *next_due < stop; i++)
        if (!lines[i].busy) {
            begin(&lines[i], *next_due);
            *next_due += gap;
        }
    return *next_due <= t ? t + 100000000 : *next_due; /* all lines busy: an answer wakes us */
}

int main(int argc, char **argv)
{
    if (argc != 9) {
        fprintf(stderr, "usage: load PORT HEAD BODIES CONNECTIONS WARM_MS MEASURE_MS GAP_US STAGGER_US\n");
        return 2;
    }
    port = atoi(argv[1]);
    read_requests(argv[2], argv[3]);
    line_count = atoi(argv[4]);
    int64_t warm = atoll(argv[5]) * 1000000, measure = atoll(argv[6]) * 1000000;
    int64_t gap = atoll(argv[7]) * 1000, stagger = atoll(argv[8]) * 1000;
    signal(SIGPIPE, SIG_IGN);
    poller = epoll_create1(0);
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(poller, EPOLL_CTL_ADD, timer, &event);
    lines = need(calloc((size_t)line_count, sizeof *lines));
    int64_t start = now(), next_due = start;
    epoch = start + warm;
    int64_t stop = epoch + measure, give_up = stop + (int64_t)DRAIN_MS * 1000000;
    for (int i = 0; i < line_count; i++) {
        lines[i].fd = -1;
        lines[i].not_before = start + i * stagger;
    }
    for (;;) {
        struct epoll_event ready[BATCH];
        int64_t wake = send_due(gap, &next_due, stop), t = now();
        if ((t >= stop && !busy_count) || t >= give_up)
            break;
        struct itimerspec when = {.it_value = {wake / 1000000000, wake % 1000000000}};
        timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL);
        int n = epoll_wait(poller, ready, BATCH, -1);
        for (int i = 0; i < n; i++) {
            uint64_t ticks;
            if (ready[i].data.ptr)
                listen_to(ready[i].data.ptr);
            else if (read(timer, &ticks, sizeof ticks) < 0 && errno != EAGAIN)
                return 1;
        }
    }
    for (int i = 0; i < line_count; i++)
        if (lines[i].busy)
            finish(&lines[i], false);
    if (fwrite(records, sizeof *records, record_count, stdout) != record_count)
        return 1;
    return 0;
}

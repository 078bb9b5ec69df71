// The part of the module API of Redis 7 and Valkey that is used here, declared
// anew after https://redis.io/docs/latest/develop/reference/modules/modules-api-ref/.
// The server hands the functions out by name.
#ifndef SPIRT_API_H
#define SPIRT_API_H

#include <stddef.h>
#include <stdint.h>

typedef struct RedisModuleCtx RedisModuleCtx;
typedef struct RedisModuleString RedisModuleString;
typedef struct RedisModuleKey RedisModuleKey;
typedef struct RedisModuleCallReply RedisModuleCallReply;
typedef struct RedisModuleBlockedClient RedisModuleBlockedClient;
typedef struct RedisModuleInfoCtx RedisModuleInfoCtx;
typedef int (*spirt_handler)(RedisModuleCtx *, RedisModuleString **, int);

enum { spirt_ok = 0, spirt_err = 1 };
enum { spirt_read = 1, spirt_write = 2 };
enum { spirt_type_empty = 0, spirt_type_string = 1 };
enum { spirt_may = 0, spirt_paused = 1, spirt_replica = 2 };
enum { spirt_pass_nothing = 0, spirt_pass_header = 1, spirt_pass_all = 2, spirt_pass_removal = 3 };
enum { spirt_header_len = 119, spirt_header_flags = 6, spirt_header_gradient = 1 }; // see FORMAT.md
enum {
	spirt_flag_lua = 1 << 0,
	spirt_flag_multi = 1 << 1,
	spirt_flag_replica = 1 << 3,
	spirt_flag_read_only = 1 << 4,
	spirt_flag_loading = 1 << 13,
	spirt_flag_deny_blocking = 1 << 21,
	spirt_flag_resp3 = 1 << 22,
};
enum {
	spirt_notify_generic = 1 << 2,
	spirt_notify_string = 1 << 3,
	spirt_notify_expired = 1 << 8,
	spirt_notify_evicted = 1 << 9,
};

typedef struct {
	uint64_t id, version;
} spirt_event;

// A view is where the bytes of a key lie; data is NULL where there is no key,
// and kind tells whether it is a string.
typedef struct {
	char *data;
	size_t len;
	int kind;
} spirt_view;

// What follows needs the server's lock, but for what says that it does not.
void spirt_lock(void);   // not where this thread has it, as in a command of the main thread
void spirt_unlock(int yield);
int spirt_may_write(void); // one of those below
void spirt_open(const char *names, const size_t *lens, int n, spirt_view *out);
int spirt_put(const char *name, size_t len, RedisModuleString *value, int replicate);
int spirt_header(const char *name, size_t len, const char *header, size_t header_len, int pass);
int spirt_delete(const char *name, size_t len);
int spirt_rename(const char *to, size_t to_len, const char *from, size_t from_len, int replicate);
int spirt_expire(const char *name, size_t len, long long at);
long long spirt_expiry(const char *name, size_t len); // -1: none, -2: no key
RedisModuleCallReply *spirt_keys(const char *pattern, size_t len, size_t *n);
const char *spirt_element(RedisModuleCallReply *r, size_t i, size_t *len, RedisModuleCallReply **element);
void spirt_free_reply(RedisModuleCallReply *r);
void spirt_free_string(RedisModuleString *s);

RedisModuleString *spirt_new_string(size_t len); // needs no lock
char *spirt_string(RedisModuleString *s, size_t *len);

// In a command of the main thread.
int spirt_register(RedisModuleCtx *ctx, const char *name, const char *flags, int first, int last, int step);
int spirt_flags(RedisModuleCtx *ctx);
int spirt_database(RedisModuleCtx *ctx);
RedisModuleString *spirt_hold(RedisModuleCtx *ctx, RedisModuleString *s);
RedisModuleBlockedClient *spirt_block(RedisModuleCtx *ctx);

// A reply: on the context of a command, or on one of a blocked client, which is
// made while that client is known to be there, and used without the lock.
RedisModuleCtx *spirt_reply_begin(RedisModuleBlockedClient *b);
void spirt_reply_end(RedisModuleBlockedClient *b, RedisModuleCtx *ctx);
void spirt_reply_simple(RedisModuleCtx *ctx, const char *s);
void spirt_reply_error(RedisModuleCtx *ctx, const char *s);
void spirt_reply_int(RedisModuleCtx *ctx, long long n);
void spirt_reply_double(RedisModuleCtx *ctx, double x);
void spirt_reply_bulk(RedisModuleCtx *ctx, const char *p, size_t len);
void spirt_reply_null(RedisModuleCtx *ctx);
void spirt_reply_array(RedisModuleCtx *ctx, long n);
void spirt_reply_map(RedisModuleCtx *ctx, long n);

void spirt_log(const char *level, const char *text);
int spirt_in_command(void); // whether this thread is the server's own, in a command
int spirt_may_reuse(void);
void spirt_count_kept(int n); // strings that are kept for reuse once they are replaced
void spirt_count_waiting(int n); // TENSOR.WAIT that are under way
void spirt_count_task(int restarted);
void spirt_count_queue(int n);

#endif

//go:build redismodule

#include "api.h"

#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

// The functions of the server, by its names for them.
static struct {
	int (*GetApi)(const char *, void *);
	int (*SetModuleAttribs)(RedisModuleCtx *, const char *, int, int);
	int (*IsModuleNameBusy)(const char *);
	int (*CreateCommand)(RedisModuleCtx *, const char *, spirt_handler, const char *, int, int, int);
	RedisModuleCtx *(*GetDetachedThreadSafeContext)(RedisModuleCtx *);
	RedisModuleCtx *(*GetThreadSafeContext)(RedisModuleBlockedClient *);
	void (*FreeThreadSafeContext)(RedisModuleCtx *);
	void (*ThreadSafeContextLock)(RedisModuleCtx *);
	void (*ThreadSafeContextUnlock)(RedisModuleCtx *);
	RedisModuleString *(*CreateString)(RedisModuleCtx *, const char *, size_t);
	void (*FreeString)(RedisModuleCtx *, RedisModuleString *);
	RedisModuleString *(*HoldString)(RedisModuleCtx *, RedisModuleString *);
	const char *(*StringPtrLen)(const RedisModuleString *, size_t *);
	void *(*OpenKey)(RedisModuleCtx *, RedisModuleString *, int);
	void (*CloseKey)(RedisModuleKey *);
	int (*KeyType)(RedisModuleKey *);
	char *(*StringDMA)(RedisModuleKey *, size_t *, int);
	int (*StringSet)(RedisModuleKey *, RedisModuleString *);
	int (*DeleteKey)(RedisModuleKey *);
	int (*SetAbsExpire)(RedisModuleKey *, long long);
	long long (*GetAbsExpire)(RedisModuleKey *);
	int (*Replicate)(RedisModuleCtx *, const char *, const char *, ...);
	RedisModuleCallReply *(*Call)(RedisModuleCtx *, const char *, const char *, ...);
	void (*FreeCallReply)(RedisModuleCallReply *);
	int (*CallReplyType)(RedisModuleCallReply *);
	size_t (*CallReplyLength)(RedisModuleCallReply *);
	RedisModuleCallReply *(*CallReplyArrayElement)(RedisModuleCallReply *, size_t);
	const char *(*CallReplyStringPtr)(RedisModuleCallReply *, size_t *);
	int (*SignalModifiedKey)(RedisModuleCtx *, RedisModuleString *);
	int (*GetContextFlags)(RedisModuleCtx *);
	int (*AvoidReplicaTraffic)(void);
	int (*GetSelectedDb)(RedisModuleCtx *);
	RedisModuleBlockedClient *(*BlockClient)(RedisModuleCtx *, spirt_handler, spirt_handler, void (*)(RedisModuleCtx *, void *), long long);
	int (*UnblockClient)(RedisModuleBlockedClient *, void *);
	void (*SetDisconnectCallback)(RedisModuleBlockedClient *, void (*)(RedisModuleCtx *, RedisModuleBlockedClient *));
	int (*SubscribeToKeyspaceEvents)(RedisModuleCtx *, int, int (*)(RedisModuleCtx *, int, const char *, RedisModuleString *));
	int (*SubscribeToServerEvent)(RedisModuleCtx *, spirt_event, void (*)(RedisModuleCtx *, spirt_event, uint64_t, void *));
	int (*GetServerVersion)(void);
	int (*RegisterInfoFunc)(RedisModuleCtx *, void (*)(RedisModuleInfoCtx *, int));
	int (*InfoAddSection)(RedisModuleInfoCtx *, const char *);
	int (*InfoAddFieldULongLong)(RedisModuleInfoCtx *, const char *, unsigned long long);
	int (*ReplyWithSimpleString)(RedisModuleCtx *, const char *);
	int (*ReplyWithError)(RedisModuleCtx *, const char *);
	int (*ReplyWithLongLong)(RedisModuleCtx *, long long);
	int (*ReplyWithDouble)(RedisModuleCtx *, double);
	int (*ReplyWithStringBuffer)(RedisModuleCtx *, const char *, size_t);
	int (*ReplyWithNull)(RedisModuleCtx *);
	int (*ReplyWithArray)(RedisModuleCtx *, long);
	int (*ReplyWithMap)(RedisModuleCtx *, long);
	void (*Log)(RedisModuleCtx *, const char *, const char *, ...);
} rm;

// What Go exports.
extern int spirtLoad(RedisModuleCtx *, RedisModuleString **, int);
extern int spirtCommand(RedisModuleCtx *, RedisModuleString **, int);
extern void spirtChanged(char *, size_t);
extern void spirtFlushed(void);
extern void spirtDisconnected(RedisModuleBlockedClient *);

static RedisModuleCtx *detached;             // for work outside of commands
static __thread RedisModuleCtx *current;     // of the command that this thread is in
static __thread int depth;                   // how often this thread has the lock
static atomic_int waiting, queued, kept;
static atomic_ullong tasks, restarts;

static int command(RedisModuleCtx *ctx, RedisModuleString **argv, int argc)
{
	RedisModuleCtx *outer = current; // a script's command comes within another
	current = ctx;
	depth++;
	int result = spirtCommand(ctx, argv, argc);
	depth--;
	current = outer;
	return result;
}

static int changed(RedisModuleCtx *ctx, int type, const char *event, RedisModuleString *key)
{
	(void)ctx, (void)type, (void)event;
	if (atomic_load(&waiting) > 0 || atomic_load(&kept) > 0) {
		size_t len;
		const char *p = rm.StringPtrLen(key, &len);
		spirtChanged((char *)p, len);
	}
	return spirt_ok;
}

// What is kept for reuse is given up before all keys go, which another thread
// may do.
static void flushed(RedisModuleCtx *ctx, spirt_event event, uint64_t sub, void *data)
{
	(void)ctx, (void)event, (void)data;
	if (sub == 0) // before
		spirtFlushed();
}

// So it is before this server takes over all that its new master has.
static void demoted(RedisModuleCtx *ctx, spirt_event event, uint64_t sub, void *data)
{
	(void)ctx, (void)event, (void)data;
	if (sub == 1) // a replica now
		spirtFlushed();
}

// No lock and no Go here: a server that crashes calls it too.
static void info(RedisModuleInfoCtx *ctx, int for_crash_report)
{
	(void)for_crash_report;
	rm.InfoAddSection(ctx, "tensors");
	rm.InfoAddFieldULongLong(ctx, "tasks", atomic_load(&tasks));
	rm.InfoAddFieldULongLong(ctx, "restarts", atomic_load(&restarts));
	rm.InfoAddFieldULongLong(ctx, "queued", atomic_load(&queued));
	rm.InfoAddFieldULongLong(ctx, "waiting", atomic_load(&waiting));
}

// The first word of a context is the function that hands out the others.
int RedisModule_OnLoad(RedisModuleCtx *ctx, RedisModuleString **argv, int argc)
{
	rm.GetApi = ((void **)ctx)[0];
	int missing = 0;
#define GET(name) missing |= rm.GetApi("RedisModule_" #name, &rm.name)
	GET(SetModuleAttribs), GET(IsModuleNameBusy), GET(CreateCommand), GET(GetDetachedThreadSafeContext), GET(GetThreadSafeContext);
	GET(FreeThreadSafeContext), GET(ThreadSafeContextLock), GET(ThreadSafeContextUnlock), GET(CreateString), GET(FreeString);
	GET(HoldString), GET(StringPtrLen), GET(OpenKey), GET(CloseKey), GET(KeyType), GET(StringDMA), GET(StringSet), GET(DeleteKey);
	GET(SetAbsExpire), GET(GetAbsExpire), GET(Replicate), GET(Call), GET(FreeCallReply), GET(CallReplyType), GET(CallReplyLength);
	GET(CallReplyArrayElement), GET(CallReplyStringPtr), GET(SignalModifiedKey), GET(GetContextFlags), GET(GetSelectedDb);
	GET(BlockClient), GET(UnblockClient), GET(SetDisconnectCallback), GET(SubscribeToKeyspaceEvents), GET(RegisterInfoFunc);
	GET(SubscribeToServerEvent), GET(GetServerVersion), GET(AvoidReplicaTraffic);
	GET(InfoAddSection), GET(InfoAddFieldULongLong), GET(ReplyWithSimpleString), GET(ReplyWithError), GET(ReplyWithLongLong);
	GET(ReplyWithDouble), GET(ReplyWithStringBuffer), GET(ReplyWithNull), GET(ReplyWithArray), GET(ReplyWithMap), GET(Log);
#undef GET
	if (rm.Log == NULL)
		return spirt_err;
	if (missing) {
		rm.Log(ctx, "warning", "this server is too old for the module: Redis 7.0 or Valkey is needed");
		return spirt_err;
	}
	if (rm.IsModuleNameBusy("spirt"))
		return spirt_err;
	rm.SetModuleAttribs(ctx, "spirt", 1, 1);
	detached = rm.GetDetachedThreadSafeContext(ctx);
	rm.SubscribeToKeyspaceEvents(ctx, spirt_notify_generic | spirt_notify_string | spirt_notify_expired | spirt_notify_evicted, changed);
	rm.SubscribeToServerEvent(ctx, (spirt_event){2, 1}, flushed);
	rm.SubscribeToServerEvent(ctx, (spirt_event){0, 1}, demoted);
	rm.RegisterInfoFunc(ctx, info);
	current = ctx;
	depth++;
	int result = spirtLoad(ctx, argv, argc);
	depth--;
	current = NULL;
	return result;
}

// Go cannot be unloaded.
int RedisModule_OnUnload(RedisModuleCtx *ctx)
{
	rm.Log(ctx, "warning", "the module stays until the server ends: its runtime cannot be unloaded");
	return spirt_err;
}

static RedisModuleCtx *here(void) { return current ? current : detached; }

void spirt_lock(void)
{
	if (depth++ == 0)
		rm.ThreadSafeContextLock(detached);
}

// The lock is not fair: who takes it again at once may keep the server out.
void spirt_unlock(int yield)
{
	if (--depth > 0)
		return;
	rm.ThreadSafeContextUnlock(detached);
	if (yield)
		usleep(30);
}

// The server itself stops commands that write, but not what was begun before.
// While its clients are paused, as in a failover, it ends rather than pass on a
// write.
int spirt_may_write(void)
{
	if (current)
		return spirt_may;
	if (rm.AvoidReplicaTraffic())
		return spirt_paused;
	int replica = spirt_flag_replica | spirt_flag_read_only;
	return (rm.GetContextFlags(detached) & replica) == replica ? spirt_replica : spirt_may;
}

static RedisModuleKey *open_key(const char *name, size_t len, int mode, RedisModuleString **k)
{
	*k = rm.CreateString(NULL, name, len);
	return rm.OpenKey(here(), *k, mode);
}

static void close_key(RedisModuleKey *key, RedisModuleString *k)
{
	if (key)
		rm.CloseKey(key);
	rm.FreeString(NULL, k);
}

void spirt_open(const char *names, const size_t *lens, int n, spirt_view *out)
{
	for (int i = 0; i < n; i++) {
		RedisModuleString *k;
		RedisModuleKey *key = open_key(names, lens[i], spirt_read, &k);
		names += lens[i];
		out[i].data = NULL;
		out[i].len = 0;
		out[i].kind = key ? rm.KeyType(key) : spirt_type_empty;
		if (out[i].kind == spirt_type_string)
			out[i].data = rm.StringDMA(key, &out[i].len, spirt_read);
		close_key(key, k);
	}
}

// What was passed on before and is so no more is removed there.
static int passed_on(RedisModuleKey *key)
{
	if (rm.KeyType(key) != spirt_type_string)
		return rm.KeyType(key) != spirt_type_empty;
	size_t len;
	const char *p = rm.StringDMA(key, &len, spirt_read);
	return len < spirt_header_len || !(p[spirt_header_flags] & spirt_header_gradient);
}

int spirt_put(const char *name, size_t len, RedisModuleString *value, int replicate)
{
	RedisModuleString *k;
	RedisModuleKey *key = open_key(name, len, spirt_read | spirt_write, &k);
	int remove = !replicate && passed_on(key);
	int result = rm.StringSet(key, value);
	if (result == spirt_ok) {
		if (replicate)
			rm.Replicate(here(), "SET", "ss", k, value);
		else if (remove)
			rm.Replicate(here(), "DEL", "s", k);
		rm.SignalModifiedKey(here(), k);
	}
	close_key(key, k);
	return result;
}

int spirt_header(const char *name, size_t len, const char *header, size_t header_len, int pass)
{
	RedisModuleString *k;
	RedisModuleKey *key = open_key(name, len, spirt_read | spirt_write, &k);
	int result = spirt_err;
	size_t have;
	char *p = NULL;
	if (key && rm.KeyType(key) == spirt_type_string)
		p = rm.StringDMA(key, &have, spirt_read | spirt_write);
	if (p && have >= header_len) {
		memcpy(p, header, header_len);
		long long at = rm.GetAbsExpire(key);
		switch (pass) {
		case spirt_pass_header:
			rm.Replicate(here(), "SETRANGE", "scb", k, "0", header, header_len);
			break;
		case spirt_pass_all:
			rm.Replicate(here(), "SET", "sb", k, p, have);
			if (at >= 0)
				rm.Replicate(here(), "PEXPIREAT", "sl", k, at);
			break;
		case spirt_pass_removal:
			rm.Replicate(here(), "DEL", "s", k);
		}
		rm.SignalModifiedKey(here(), k);
		result = spirt_ok;
	}
	close_key(key, k);
	return result;
}

int spirt_delete(const char *name, size_t len)
{
	RedisModuleString *k;
	RedisModuleKey *key = open_key(name, len, spirt_read | spirt_write, &k);
	int found = key && rm.KeyType(key) != spirt_type_empty;
	if (found) {
		rm.DeleteKey(key);
		rm.Replicate(here(), "DEL", "s", k);
		rm.SignalModifiedKey(here(), k);
	}
	close_key(key, k);
	return found;
}

int spirt_rename(const char *to, size_t to_len, const char *from, size_t from_len, int replicate)
{
	RedisModuleCallReply *r = rm.Call(here(), "RENAME", "bb", from, from_len, to, to_len);
	if (r == NULL || rm.CallReplyType(r) == 1) {
		if (r)
			rm.FreeCallReply(r);
		return spirt_err;
	}
	rm.FreeCallReply(r);
	if (replicate)
		rm.Replicate(here(), "RENAME", "bb", from, from_len, to, to_len);
	else
		rm.Replicate(here(), "DEL", "bb", from, from_len, to, to_len);
	return spirt_ok;
}

int spirt_expire(const char *name, size_t len, long long at)
{
	RedisModuleString *k;
	RedisModuleKey *key = open_key(name, len, spirt_read | spirt_write, &k);
	int found = key && rm.KeyType(key) != spirt_type_empty && rm.SetAbsExpire(key, at) == spirt_ok;
	if (found && at < 0)
		rm.Replicate(here(), "PERSIST", "s", k);
	else if (found)
		rm.Replicate(here(), "PEXPIREAT", "sl", k, at);
	close_key(key, k);
	return found;
}

long long spirt_expiry(const char *name, size_t len)
{
	RedisModuleString *k;
	RedisModuleKey *key = open_key(name, len, spirt_read, &k);
	long long at = -2;
	if (key && rm.KeyType(key) != spirt_type_empty)
		at = rm.GetAbsExpire(key);
	close_key(key, k);
	return at;
}

RedisModuleCallReply *spirt_keys(const char *pattern, size_t len, size_t *n)
{
	RedisModuleCallReply *r = rm.Call(here(), "KEYS", "b", pattern, len);
	*n = r ? rm.CallReplyLength(r) : 0;
	return r;
}

const char *spirt_element(RedisModuleCallReply *r, size_t i, size_t *len, RedisModuleCallReply **element)
{
	*element = rm.CallReplyArrayElement(r, i);
	return rm.CallReplyStringPtr(*element, len);
}

void spirt_free_reply(RedisModuleCallReply *r) { rm.FreeCallReply(r); }
void spirt_free_string(RedisModuleString *s) { rm.FreeString(NULL, s); }

// Without a context nothing but the allocator is touched, which has a lock of
// its own.
RedisModuleString *spirt_new_string(size_t len) { return rm.CreateString(NULL, NULL, len); }
char *spirt_string(RedisModuleString *s, size_t *len) { return (char *)rm.StringPtrLen(s, len); }

int spirt_register(RedisModuleCtx *ctx, const char *name, const char *flags, int first, int last, int step)
{
	return rm.CreateCommand(ctx, name, command, flags, first, last, step);
}

int spirt_flags(RedisModuleCtx *ctx) { return rm.GetContextFlags(ctx); }
int spirt_database(RedisModuleCtx *ctx) { return rm.GetSelectedDb(ctx); }
RedisModuleString *spirt_hold(RedisModuleCtx *ctx, RedisModuleString *s) { return rm.HoldString(ctx, s); }

static void disconnected(RedisModuleCtx *ctx, RedisModuleBlockedClient *b)
{
	(void)ctx;
	spirtDisconnected(b);
}

RedisModuleBlockedClient *spirt_block(RedisModuleCtx *ctx)
{
	RedisModuleBlockedClient *b = rm.BlockClient(ctx, NULL, NULL, NULL, 0);
	if (b)
		rm.SetDisconnectCallback(b, disconnected);
	return b;
}

RedisModuleCtx *spirt_reply_begin(RedisModuleBlockedClient *b) { return rm.GetThreadSafeContext(b); }

void spirt_reply_end(RedisModuleBlockedClient *b, RedisModuleCtx *ctx)
{
	rm.FreeThreadSafeContext(ctx);
	rm.UnblockClient(b, NULL);
}

void spirt_reply_simple(RedisModuleCtx *ctx, const char *s) { rm.ReplyWithSimpleString(ctx, s); }
void spirt_reply_error(RedisModuleCtx *ctx, const char *s) { rm.ReplyWithError(ctx, s); }
void spirt_reply_int(RedisModuleCtx *ctx, long long n) { rm.ReplyWithLongLong(ctx, n); }
void spirt_reply_double(RedisModuleCtx *ctx, double x) { rm.ReplyWithDouble(ctx, x); }
void spirt_reply_bulk(RedisModuleCtx *ctx, const char *p, size_t len) { rm.ReplyWithStringBuffer(ctx, p, len); }
void spirt_reply_null(RedisModuleCtx *ctx) { rm.ReplyWithNull(ctx); }
void spirt_reply_array(RedisModuleCtx *ctx, long n) { rm.ReplyWithArray(ctx, n); }
void spirt_reply_map(RedisModuleCtx *ctx, long n) { rm.ReplyWithMap(ctx, n); }

void spirt_log(const char *level, const char *text) { rm.Log(NULL, level, "%s", text); }
int spirt_in_command(void) { return current != NULL; }

// Redis 8 may send a value to a client from where it lies, after it was
// replaced: there nothing is used again.
int spirt_may_reuse(void) { return rm.GetServerVersion() < 0x080000; }

void spirt_count_kept(int n) { atomic_fetch_add(&kept, n); }
void spirt_count_waiting(int n) { atomic_fetch_add(&waiting, n); }
void spirt_count_queue(int n) { atomic_fetch_add(&queued, n); }

void spirt_count_task(int restarted)
{
	atomic_fetch_add(restarted ? &restarts : &tasks, 1);
}

//go:build redismodule

// Command redismodule is the tensor database as a module of Redis and Valkey:
// the same commands, carried out by the same code, on tensors that are strings
// of the server. Build it by `make module` and load ./spirt.so; docs/redis.md
// is for those who run the server.
//
// Commands that take long are carried out by one worker, beside the server's
// own thread, which is let in between two parts of a millisecond or so. What a
// command makes becomes visible at one moment. Within MULTI and scripts, which
// the server carries out as a whole, commands run in its own thread.
package main

// #include <stdlib.h>
// #include "api.h"
import "C"

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"unsafe"

	"github.com/spirt-ml/spirt/resp"
	"github.com/spirt-ml/spirt/tensordb"
)

func main() {} // what c-shared wants

// Bounds.
const (
	maxQueue   = 4096 // commands that wait for the worker
	maxWaiting = 1024 // TENSOR.WAIT under way
	maxArgs    = 1 << 16
	maxArg     = 4 << 10 // bytes of an argument that is not a tensor
)

// module is the one there is in this process.
type module struct {
	space *keyspace
	db    *tensordb.DB
	queue chan *call

	mu      sync.Mutex
	waiting map[*C.RedisModuleBlockedClient]chan struct{} // closed when the client is gone
}

var loaded *module

// call is a command that a client waits for.
type call struct {
	cmd     *tensordb.Command
	args    [][]byte
	payload *payload // nil: none
	client  *C.RedisModuleBlockedClient
	ctx     *C.RedisModuleCtx // to reply to client
	resp3   bool
	done    chan struct{}
}

//export spirtLoad
func spirtLoad(ctx *C.RedisModuleCtx, argv **C.RedisModuleString, argc C.int) (result C.int) {
	defer recovered(func(string) { result = C.spirt_err })
	var words []string
	for _, s := range unsafe.Slice(argv, int(argc)) {
		words = append(words, string(bytesOf(s)))
	}
	config, err := parseArgs(words)
	if err != nil {
		logText("warning", err.Error())
		return C.spirt_err
	}
	m := &module{space: newKeyspace(config.chunk), queue: make(chan *call, maxQueue), waiting: make(map[*C.RedisModuleBlockedClient]chan struct{})}
	if m.db, err = tensordb.Open(tensordb.Config{Keyspace: m.space, MaxMemory: config.memory}); err != nil {
		logText("warning", err.Error())
		return C.spirt_err
	}
	m.space.changed = m.db.Changed
	for _, cmd := range tensordb.Commands() {
		if cmd.ServerOnly() {
			continue
		}
		flags := "write deny-oom"
		switch {
		case cmd.Waits:
			flags = "readonly blocking"
		case cmd.Access == tensordb.ReadOnly:
			flags = "readonly"
		case cmd.Name == "TENSOR.DEL":
			flags = "write"
		}
		step := 0
		if cmd.FirstKey > 0 {
			step = max(cmd.KeyStep, 1)
		}
		name, f := C.CString(strings.ToLower(cmd.Name)), C.CString(flags)
		failed := C.spirt_register(ctx, name, f, C.int(cmd.FirstKey), C.int(cmd.LastKey), C.int(step))
		C.free(unsafe.Pointer(name))
		C.free(unsafe.Pointer(f))
		if failed != 0 {
			logText("warning", "the server refuses the command "+cmd.Name)
			return C.spirt_err
		}
	}
	loaded = m
	go m.work() // until the process ends: a module with Go cannot be unloaded
	return C.spirt_ok
}

// moduleConfig is what the module is told when it is loaded.
type moduleConfig struct {
	memory int64 // of accumulators and of what is read; 0: not bounded
	chunk  int   // bytes that are worked on before the server is let in
}

// parseArgs reads pairs of a name and a value.
func parseArgs(words []string) (moduleConfig, error) {
	c := moduleConfig{chunk: 24 << 20}
	for ; len(words) > 0; words = words[min(2, len(words)):] {
		if len(words) == 1 {
			return c, fmt.Errorf("the module's argument %q has no value: use memory SIZE or chunk SIZE", words[0])
		}
		n, err := parseSize(words[1])
		if err != nil {
			return c, fmt.Errorf("the module's argument %s: %w", words[0], err)
		}
		switch strings.ToLower(words[0]) {
		case "memory":
			c.memory = n
		case "chunk":
			if n < 64<<10 || n > 1<<30 {
				return c, fmt.Errorf("the module's argument chunk: %d bytes are not between 64 kB and 1 GB", n)
			}
			c.chunk = int(n)
		default:
			return c, fmt.Errorf("the module has no argument %q: use memory SIZE or chunk SIZE", words[0])
		}
	}
	return c, nil
}

// parseSize reads a size as redis.conf has them, such as 4gb.
func parseSize(text string) (int64, error) {
	digits := strings.TrimRight(strings.ToLower(text), "abcdefghijklmnopqrstuvwxyz")
	unit, ok := map[string]int64{"": 1, "b": 1, "k": 1000, "kb": 1 << 10, "m": 1000_000, "mb": 1 << 20, "g": 1000_000_000, "gb": 1 << 30}[strings.ToLower(text[len(digits):])]
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || !ok || n < 0 || n > math.MaxInt64/unit {
		return 0, fmt.Errorf("%q is no size: take one such as 512mb or 4gb", text)
	}
	return n * unit, nil
}

//export spirtCommand
func spirtCommand(ctx *C.RedisModuleCtx, argv **C.RedisModuleString, argc C.int) (result C.int) {
	defer recovered(func(text string) { replyError(ctx, "ERR", text) })
	if err := loaded.command(ctx, unsafe.Slice(argv, int(argc))); err != nil {
		var refused *resp.Error
		errors.As(err, &refused)
		replyError(ctx, refused.Code, refused.Message)
	}
	return C.spirt_ok
}

// command answers in the server's thread, or passes a command on. Its error is
// a *resp.Error.
func (m *module) command(ctx *C.RedisModuleCtx, argv []*C.RedisModuleString) error {
	name, cmd := tensordb.FindCommand(bytesOf(argv[0]))
	if cmd == nil {
		return &resp.Error{Code: "ERR", Message: "unknown command " + name}
	}
	if err := cmd.CheckArgs(len(argv), bytesOf(argv[0])); err != nil {
		return err
	}
	if C.spirt_database(ctx) != 0 {
		return &resp.Error{Code: "ERR", Message: "tensors lie in database 0: SELECT 0 first"}
	}
	if len(argv) > maxArgs {
		return &resp.Error{Code: "TOOLARGE", Message: fmt.Sprintf("%d arguments, at most %d are allowed", len(argv), maxArgs)}
	}
	flags := C.spirt_flags(ctx)
	c := &call{cmd: cmd, resp3: flags&C.spirt_flag_resp3 != 0}
	last := argv[1:]
	if cmd.Payload {
		last = argv[1 : len(argv)-1]
	}
	for i, s := range last {
		b := bytesOf(s)
		if len(b) > maxArg {
			return &resp.Error{Code: "TOOLARGE", Message: fmt.Sprintf("argument %d has %d bytes, at most %d are allowed", i+1, len(b), maxArg)}
		}
		c.args = append(c.args, bytes.Clone(b))
	}
	if cmd.Payload {
		c.payload = m.space.hold(ctx, argv[len(argv)-1])
	}
	if flags&(C.spirt_flag_lua|C.spirt_flag_multi|C.spirt_flag_loading|C.spirt_flag_deny_blocking) != 0 || cmd.Name == "TENSOR.META" {
		if cmd.Waits { // nothing can happen meanwhile
			c.args[2] = []byte("0")
		}
		c.run(m.db, ctx)
		m.space.drain()
		return nil
	}
	if c.client = C.spirt_block(ctx); c.client == nil {
		m.space.release(c.payload)
		return &resp.Error{Code: "ERR", Message: "the server lets no command wait here"}
	}
	c.ctx = C.spirt_reply_begin(c.client)
	if cmd.Waits {
		return m.startWait(c)
	}
	select {
	case m.queue <- c:
		C.spirt_count_queue(1)
	default:
		c.refuse("BUSY", fmt.Sprintf("%d commands wait already: send fewer at once", maxQueue))
		m.space.release(c.payload)
		m.space.drain()
	}
	return nil
}

// startWait carries out a TENSOR.WAIT in a goroutine of its own.
func (m *module) startWait(c *call) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.waiting) >= maxWaiting {
		c.refuse("BUSY", fmt.Sprintf("%d clients wait already", maxWaiting))
		return nil
	}
	c.done = make(chan struct{})
	m.waiting[c.client] = c.done
	C.spirt_count_waiting(1)
	go func() {
		c.finish(m.db, func() {
			m.mu.Lock()
			delete(m.waiting, c.client)
			m.mu.Unlock()
			C.spirt_count_waiting(-1)
		})
		m.space.drain()
	}()
	return nil
}

//export spirtDisconnected
func spirtDisconnected(client *C.RedisModuleBlockedClient) {
	defer recovered(nil)
	m := loaded
	m.mu.Lock()
	defer m.mu.Unlock()
	if done := m.waiting[client]; done != nil {
		close(done)
		delete(m.waiting, client)
	}
}

//export spirtChanged
func spirtChanged(key *C.char, n C.size_t) {
	defer recovered(nil)
	if loaded != nil {
		name := C.GoStringN(key, C.int(n))
		loaded.space.forget(name)
		loaded.db.Changed(name)
	}
}

//export spirtFlushed
func spirtFlushed() {
	defer recovered(nil)
	if loaded != nil {
		loaded.space.forgetAll()
	}
}

// work carries out one command after the other.
func (m *module) work() {
	for c := range m.queue {
		C.spirt_count_queue(-1)
		c.finish(m.db, nil)
		m.space.drain()
		C.spirt_count_task(0)
	}
}

// finish carries a command out and answers the client that waits for it.
// before, if not nil, is called before the client goes on.
func (c *call) finish(db *tensordb.DB, before func()) {
	c.run(db, c.ctx)
	if before != nil {
		before()
	}
	C.spirt_reply_end(c.client, c.ctx)
}

// refuse answers the client that waits with an error.
func (c *call) refuse(code, text string) {
	replyError(c.ctx, code, text)
	C.spirt_reply_end(c.client, c.ctx)
}

// run carries a command out and replies on ctx.
func (c *call) run(db *tensordb.DB, ctx *C.RedisModuleCtx) {
	r := &replier{ctx: ctx, resp3: c.resp3}
	defer recovered(func(text string) {
		if !r.sent {
			replyError(ctx, "ERR", text)
		}
	})
	todo := &tensordb.Call{DB: db, Args: c.args, Reply: r, Done: c.done}
	if c.payload != nil {
		defer loaded.space.release(c.payload)
		todo.Payload = c.payload
	}
	err := c.cmd.Run(todo)
	var refused *resp.Error
	switch {
	case err == nil:
		r.send()
	case errors.As(err, &refused):
		replyError(ctx, refused.Code, refused.Message)
	default:
		replyError(ctx, "ERR", err.Error())
	}
}

// recovered turns a panic into a reply and a line in the server's log.
func recovered(reply func(text string)) {
	if p := recover(); p != nil {
		logText("warning", fmt.Sprintf("a command failed badly: %v\n%s", p, debug.Stack()))
		if reply != nil {
			reply("internal error, the server's log has more")
		}
	}
}

func logText(level, text string) {
	l, t := C.CString(level), C.CString(text)
	C.spirt_log(l, t)
	C.free(unsafe.Pointer(l))
	C.free(unsafe.Pointer(t))
}

// bytesOf returns the bytes of a string, which it aliases.
func bytesOf(s *C.RedisModuleString) []byte {
	var n C.size_t
	p := C.spirt_string(s, &n)
	return unsafe.Slice((*byte)(unsafe.Pointer(p)), int(n))
}

func replyError(ctx *C.RedisModuleCtx, code, text string) {
	line := strings.Map(func(r rune) rune {
		if r == '\r' || r == '\n' || r == 0 {
			return ' '
		}
		return r
	}, cmp.Or(code, "ERR")+" "+text)
	s := C.CString(line)
	C.spirt_reply_error(ctx, s)
	C.free(unsafe.Pointer(s))
}

// replier keeps a reply until it is known that it is not an error.
type replier struct {
	ctx   *C.RedisModuleCtx
	resp3 bool
	parts []func()
	sent  bool
}

func (r *replier) add(f func()) { r.parts = append(r.parts, f) }

func (r *replier) send() {
	r.sent = true
	for _, f := range r.parts {
		f()
	}
	r.parts = nil
}

func (r *replier) Simple(s string) {
	r.add(func() {
		t := C.CString(s)
		C.spirt_reply_simple(r.ctx, t)
		C.free(unsafe.Pointer(t))
	})
}

func (r *replier) Int(n int64) { r.add(func() { C.spirt_reply_int(r.ctx, C.longlong(n)) }) }

// Double is text in RESP2, as few digits as tell it from others.
func (r *replier) Double(x float64) {
	if !r.resp3 {
		b := resp.AppendDouble(nil, 2, x) // $length CR LF digits CR LF
		_, digits, _ := strings.Cut(string(b), "\r\n")
		r.Text(strings.TrimSuffix(digits, "\r\n"))
		return
	}
	r.add(func() { C.spirt_reply_double(r.ctx, C.double(x)) })
}

func (r *replier) Float17(x float64) {
	if r.resp3 {
		r.add(func() { C.spirt_reply_double(r.ctx, C.double(x)) })
	} else {
		r.Text(tensordb.Float17(x))
	}
}

func (r *replier) Bulk(b []byte) { r.Text(string(b)) }

func (r *replier) Text(s string) { r.add(func() { replyBulk(r.ctx, unsafe.StringData(s), len(s)) }) }
func (r *replier) Nil()          { r.add(func() { C.spirt_reply_null(r.ctx) }) }
func (r *replier) Array(n int)   { r.add(func() { C.spirt_reply_array(r.ctx, C.long(n)) }) }
func (r *replier) Map(n int)     { r.add(func() { C.spirt_reply_map(r.ctx, C.long(n)) }) }

// Tensor sends all so far, and data, which is not kept.
func (r *replier) Tensor(data []byte) error {
	r.send()
	replyBulk(r.ctx, unsafe.SliceData(data), len(data))
	return nil
}

func replyBulk(ctx *C.RedisModuleCtx, p *byte, n int) {
	if n == 0 {
		var zero byte
		p = &zero
	}
	C.spirt_reply_bulk(ctx, (*C.char)(unsafe.Pointer(p)), C.size_t(n))
}

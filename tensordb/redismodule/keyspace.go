//go:build redismodule

package main

// #include "api.h"
import "C"

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/spirt-ml/spirt/resp"
	"github.com/spirt-ml/spirt/tensordb"
)

// keyspace is the Keyspace of strings in the server. It holds no references
// into the server's memory: a string is looked for again whenever the lock was
// let go, and what has another version by then is read anew.
//
// What a task makes is written into a string that nobody else has, without the
// lock; the server takes that string over as it is. Of large ones a reference
// is kept, so that the memory is used again once a newer version has taken its
// place: fresh memory costs more in page faults than most tasks take.
type keyspace struct {
	chunk   int // bytes of work between two chances for the server
	reuse   bool
	changed func(key string)
	last    atomic.Uint64 // version given out last, or seen

	mu      sync.Mutex
	freed   []*C.RedisModuleString // to be given back under the lock
	kept    map[string]*C.RedisModuleString
	pool    map[int][]*C.RedisModuleString // by length; nobody else has these
	pooled  int                            // bytes of pool
	buffers map[int][][]byte               // by length, of what was read
	held    int                            // bytes of buffers
}

// Bounds of what is used again.
const (
	reuseMin = 64 << 10  // bytes of a string worth it
	reuseMax = 512 << 20 // bytes of pool, and of buffers
)

func newKeyspace(chunk int) *keyspace {
	k := &keyspace{
		chunk: chunk, reuse: C.spirt_may_reuse() != 0, kept: make(map[string]*C.RedisModuleString), pool: make(map[int][]*C.RedisModuleString), buffers: make(map[int][][]byte),
	}
	k.last.Store(uint64(time.Now().UnixMicro()))
	return k
}

// lock takes the server's lock, which belongs to a thread. Where this is the
// server's own thread in a command, it has it already.
func (k *keyspace) lock() {
	runtime.LockOSThread()
	C.spirt_lock()
}

// lockToWrite takes the lock when the server takes writes: not while its clients
// are paused. Its error is that the server has become a replica; then the lock
// is not taken.
func (k *keyspace) lockToWrite() error {
	for {
		k.lock()
		switch C.spirt_may_write() {
		case C.spirt_may:
			return nil
		case C.spirt_replica:
			k.unlock()
			return &resp.Error{Code: "READONLY", Message: "the server has become a read-only replica"}
		}
		k.unlock()
		time.Sleep(pauseCheck) // the server tells nobody when the pause is over
	}
}

// pauseCheck is how often a paused server is looked at.
const pauseCheck = 5 * time.Millisecond

func (k *keyspace) unlock() { k.unlockYield(0) }

func (k *keyspace) unlockYield(yield C.int) {
	C.spirt_unlock(yield)
	runtime.UnlockOSThread()
}

// saw notes a version: those that are given out are larger.
func (k *keyspace) saw(version uint64) {
	for {
		last := k.last.Load()
		if version <= last || k.last.CompareAndSwap(last, version) {
			return
		}
	}
}

// free gives a string back when the lock is next taken.
func (k *keyspace) free(s *C.RedisModuleString) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.freed = append(k.freed, s)
}

// drain gives strings back.
func (k *keyspace) drain() {
	k.mu.Lock()
	list := k.freed
	k.freed = nil
	k.mu.Unlock()
	if len(list) == 0 {
		return
	}
	k.lock()
	defer k.unlock()
	for _, s := range list {
		C.spirt_free_string(s)
	}
}

// forget gives up the reference to the string under key. The lock is held.
func (k *keyspace) forget(key string) {
	k.mu.Lock()
	s := k.kept[key]
	delete(k.kept, key)
	k.mu.Unlock()
	if s != nil {
		C.spirt_count_kept(-1)
		C.spirt_free_string(s)
	}
}

// forgetAll gives up all references, and the pool. The lock is held.
func (k *keyspace) forgetAll() {
	k.mu.Lock()
	kept, pool := k.kept, k.pool
	k.kept, k.pool, k.pooled = make(map[string]*C.RedisModuleString), make(map[int][]*C.RedisModuleString), 0
	k.mu.Unlock()
	C.spirt_count_kept(C.int(-len(kept)))
	for _, s := range kept {
		C.spirt_free_string(s)
	}
	for _, list := range pool {
		for _, s := range list {
			C.spirt_free_string(s)
		}
	}
}

// replaced returns the string under key if it is the one that is kept, and
// nobody but the server and this program has it; and forgets it. Call it before
// the key gets another, and recycle after. The lock is held.
func (k *keyspace) replaced(key string) *C.RedisModuleString {
	k.mu.Lock()
	s := k.kept[key]
	k.mu.Unlock()
	if s == nil {
		return nil
	}
	n := namesOf([]string{key})
	n.open()
	b := n.at(0)
	// Within a command of the server's own thread it may not have passed on yet
	// what was replicated.
	if b == nil || unsafe.SliceData(b) != unsafe.SliceData(bytesOf(s)) || C.spirt_in_command() != 0 {
		k.forget(key)
		return nil
	}
	k.mu.Lock()
	delete(k.kept, key)
	k.mu.Unlock()
	C.spirt_count_kept(-1)
	return s
}

// recycle puts a string that nobody else has any more into the pool. nil is
// none. The lock is held.
func (k *keyspace) recycle(s *C.RedisModuleString) {
	if s == nil {
		return
	}
	n := len(bytesOf(s))
	var drop []*C.RedisModuleString
	k.mu.Lock()
	for other, list := range k.pool { // what was used before makes room
		for other != n && k.pooled+n > reuseMax && len(list) > 0 {
			drop = append(drop, list[len(list)-1])
			list = list[:len(list)-1]
			k.pooled -= other
		}
		if k.pool[other] = list; len(list) == 0 {
			delete(k.pool, other)
		}
	}
	if k.pooled+n > reuseMax {
		drop = append(drop, s)
	} else {
		k.pool[n] = append(k.pool[n], s)
		k.pooled += n
	}
	k.mu.Unlock()
	for _, s := range drop {
		C.spirt_free_string(s)
	}
}

// keep keeps a reference to the string that was put under key, or gives it up.
// The lock is held.
func (k *keyspace) keep(key string, s *C.RedisModuleString) {
	k.forget(key)
	if !k.reuse || len(bytesOf(s)) < reuseMin || C.spirt_in_command() != 0 {
		C.spirt_free_string(s)
		return
	}
	k.mu.Lock()
	k.kept[key] = s
	k.mu.Unlock()
	C.spirt_count_kept(1)
}

// buffer returns memory of the program for what is read.
func (k *keyspace) buffer(n int) []byte {
	k.mu.Lock()
	defer k.mu.Unlock()
	if list := k.buffers[n]; len(list) > 0 {
		b := list[len(list)-1]
		k.buffers[n] = list[:len(list)-1]
		k.held -= n
		return b
	}
	return make([]byte, n)
}

// giveBack lets a buffer be used again.
func (k *keyspace) giveBack(b []byte) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(b) >= reuseMin && k.held+len(b) <= reuseMax {
		k.buffers[len(b)] = append(k.buffers[len(b)], b)
		k.held += len(b)
	}
}

// names are keys as C takes them.
type names struct {
	text  []byte
	lens  []C.size_t
	views []C.spirt_view
}

func namesOf(keys []string) *names {
	n := &names{lens: make([]C.size_t, len(keys)), views: make([]C.spirt_view, len(keys))}
	for i, key := range keys {
		n.text = append(n.text, key...)
		n.lens[i] = C.size_t(len(key))
	}
	n.text = append(n.text, 0) // so that there is a first byte
	return n
}

// open looks where the strings are. The lock is held, and must stay held while
// they are used.
func (n *names) open() {
	if len(n.lens) > 0 {
		C.spirt_open((*C.char)(unsafe.Pointer(&n.text[0])), &n.lens[0], C.int(len(n.lens)), &n.views[0])
	}
}

// at returns the bytes of a string, nil if there is none.
func (n *names) at(i int) []byte {
	v := n.views[i]
	if v.data == nil {
		return nil
	}
	return unsafe.Slice((*byte)(unsafe.Pointer(v.data)), int(v.len))
}

// metas reads the headers after open; nil where there is no key.
func (n *names) metas(k *keyspace, keys []string) ([]*tensordb.Meta, error) {
	metas := make([]*tensordb.Meta, len(keys))
	for i := range keys {
		b := n.at(i)
		if n.views[i].kind == C.spirt_type_empty {
			continue
		}
		if b == nil {
			return nil, fmt.Errorf("%w: %q is not a string", tensordb.ErrWrongType, keys[i])
		}
		m, err := tensordb.DecodeHeader(b)
		if err != nil {
			return nil, fmt.Errorf("%q: %w", keys[i], err)
		}
		k.saw(m.Version)
		metas[i] = &m
	}
	return metas, nil
}

func (k *keyspace) Stat(keys ...string) ([]*tensordb.Meta, error) {
	n := namesOf(keys)
	k.lock()
	defer k.unlock()
	n.open()
	return n.metas(k, keys)
}

func noKey(key string) error { return fmt.Errorf("%w: %q", tensordb.ErrNoKey, key) }

func (k *keyspace) Get(keys ...string) ([]*tensordb.Ref, error) {
	refs := make([]*tensordb.Ref, len(keys))
	var data [][]byte
	metas := make([]tensordb.Meta, len(keys))
	err := k.Run(&tensordb.Task{
		Reads: keys,
		Plan: func(reads []*tensordb.Meta) (tensordb.Plan, error) {
			data = data[:0]
			span := 0
			for i, m := range reads {
				metas[i] = *m
				data = append(data, k.buffer(m.Len()*m.DType.Size()))
				span = max(span, len(data[i]))
			}
			return tensordb.Plan{Span: span, Weight: 2 * len(keys)}, nil
		},
		Compute: func(_, src [][]byte, lo, hi int) {
			for i, d := range data {
				if lo < len(d) {
					copy(d[lo:min(hi, len(d))], src[i][lo:])
				}
			}
		},
	})
	if err != nil {
		return nil, err
	}
	for i := range refs {
		refs[i] = tensordb.NewRef(metas[i], data[i], nil, func() { k.giveBack(data[i]) })
	}
	return refs, nil
}

func (k *keyspace) Range(key string, start, count int) (*tensordb.Ref, error) {
	var part []byte
	var meta tensordb.Meta
	err := k.Run(&tensordb.Task{
		Reads: []string{key},
		Plan: func(reads []*tensordb.Meta) (tensordb.Plan, error) {
			meta = *reads[0]
			size := meta.Len() * meta.DType.Size()
			lo := min(start, size)
			part = k.buffer(min(count, size-lo))
			return tensordb.Plan{Span: len(part), Weight: 2}, nil
		},
		Compute: func(_, src [][]byte, lo, hi int) { copy(part[lo:hi], src[0][start+lo:]) },
	})
	if err != nil {
		return nil, err
	}
	return tensordb.NewRef(meta, part, nil, func() { k.giveBack(part) }), nil
}

// output is a string that becomes a tensor.
type output struct {
	k      *keyspace
	string *C.RedisModuleString
	bytes  []byte // header and data
}

// alloc makes one. Nobody but this program has it: it may be written to.
func (k *keyspace) alloc(n int) *output {
	n += tensordb.HeaderLen
	var s *C.RedisModuleString
	k.mu.Lock()
	if list := k.pool[n]; len(list) > 0 {
		s = list[len(list)-1]
		k.pool[n] = list[:len(list)-1]
		k.pooled -= n
	}
	k.mu.Unlock()
	if s == nil {
		s = C.spirt_new_string(C.size_t(n))
	}
	return &output{k: k, string: s, bytes: bytesOf(s)}
}

func (o *output) Data() []byte { return o.bytes[tensordb.HeaderLen:] }

func (o *output) Release() {
	if o.string != nil {
		o.k.free(o.string)
		o.string = nil
	}
}

// put makes the string the tensor under key. The lock is held.
func (o *output) put(key string, meta tensordb.Meta) uint64 {
	meta.Version = o.k.last.Add(1)
	tensordb.EncodeHeader(o.bytes, meta)
	replicate := C.int(1)
	if meta.Gradient {
		replicate = 0
	}
	name := namesOf([]string{key})
	old := o.k.replaced(key)
	C.spirt_put((*C.char)(unsafe.Pointer(&name.text[0])), name.lens[0], o.string, replicate)
	o.k.recycle(old)
	o.k.keep(key, o.string) // the server has its own reference
	o.string = nil
	return meta.Version
}

func (k *keyspace) Alloc(n int) (tensordb.Buffer, error) { return k.alloc(n), nil }

func (k *keyspace) Put(key string, meta tensordb.Meta, b tensordb.Buffer) (uint64, error) {
	if err := k.lockToWrite(); err != nil {
		b.Release()
		return 0, err
	}
	version := b.(*output).put(key, meta)
	k.unlock()
	k.changed(key)
	return version, nil
}

// attempts is how often a task is carried out bit by bit. If what it reads
// changes all the while, it is then carried out as a whole.
const attempts = 3

func (k *keyspace) Run(t *tensordb.Task) error {
	for i := 0; ; i++ {
		done, err := k.try(t, i >= attempts)
		if done || err != nil {
			return err
		}
		C.spirt_count_task(1)
	}
}

// try reports whether the task is done; if not, something that it reads has
// changed.
func (k *keyspace) try(t *tensordb.Task, whole bool) (done bool, err error) {
	n := namesOf(t.Reads)
	k.lock()
	locked := true
	defer func() {
		if locked {
			k.unlock()
		}
	}()
	letGo := func(yield C.int) {
		if !whole {
			k.unlockYield(yield)
			locked = false
		}
	}
	again := func() {
		if !locked {
			k.lock()
			locked = true
		}
	}
	n.open()
	metas, err := n.metas(k, t.Reads)
	if err != nil {
		return false, err
	}
	for i, m := range metas {
		if m == nil && i < len(metas)-t.Optional {
			return false, noKey(t.Reads[i])
		}
	}
	letGo(0)
	plan, err := t.Plan(metas)
	if err != nil || plan.Nothing {
		return true, err
	}
	outputs, dst := make([]*output, len(plan.Writes)), make([][]byte, len(plan.Writes))
	defer func() {
		for _, o := range outputs {
			if o != nil {
				o.Release()
			}
		}
	}()
	for i, w := range plan.Writes {
		outputs[i] = k.alloc(w.Meta.Len() * w.Meta.DType.Size())
		dst[i] = outputs[i].Data()
	}
	current := func() bool {
		n.open()
		for i, m := range metas {
			b := n.at(i)
			if m == nil && b == nil {
				continue
			}
			if m == nil || b == nil || len(b) != tensordb.HeaderLen+m.Len()*m.DType.Size() || tensordb.HeaderVersion(b) != m.Version {
				return false
			}
		}
		return true
	}
	src := make([][]byte, len(t.Reads))
	step := max(k.chunk/max(plan.Weight, 1)&^(chunkUnit-1), chunkUnit)
	for lo := 0; lo < plan.Span; lo += step {
		if len(t.Reads) > 0 {
			again()
			if !whole && !current() {
				return false, nil
			}
			for i := range src {
				if b := n.at(i); b != nil {
					src[i] = b[tensordb.HeaderLen:]
				}
			}
		}
		t.Compute(dst, src, lo, min(lo+step, plan.Span))
		if len(t.Reads) > 0 {
			letGo(1)
		}
	}
	if t.Check != nil {
		if err := t.Check(); err != nil {
			return false, err
		}
	}
	if len(plan.Writes) == 0 {
		return true, nil
	}
	if locked {
		k.unlock()
		locked = false
	}
	if err := k.lockToWrite(); err != nil {
		return false, err
	}
	locked = true
	if t.Guarded && !current() {
		return false, nil
	}
	t.Versions = t.Versions[:0]
	for i, w := range plan.Writes {
		t.Versions = append(t.Versions, outputs[i].put(w.Key, w.Meta))
	}
	k.unlock()
	locked = false
	for _, w := range plan.Writes {
		k.changed(w.Key)
	}
	return true, nil
}

// chunkUnit is what parts of a span are multiples of.
const chunkUnit = 16384

func (k *keyspace) Edit(key string, edit func(*tensordb.Meta)) error {
	n := namesOf([]string{key})
	if err := k.lockToWrite(); err != nil {
		return err
	}
	defer k.unlock()
	n.open()
	metas, err := n.metas(k, []string{key})
	if err != nil {
		return err
	}
	if metas[0] == nil {
		return noKey(key)
	}
	m := *metas[0]
	edit(&m)
	m.Version = k.last.Add(1)
	header := make([]byte, tensordb.HeaderLen)
	tensordb.EncodeHeader(header, m)
	pass := C.int(C.spirt_pass_header)
	switch {
	case m.Gradient && metas[0].Gradient:
		pass = C.spirt_pass_nothing
	case m.Gradient:
		pass = C.spirt_pass_removal
	case metas[0].Gradient:
		pass = C.spirt_pass_all // a replica does not have it
	}
	k.forget(key) // a string that somebody else has too is copied before it is changed
	C.spirt_header((*C.char)(unsafe.Pointer(&n.text[0])), n.lens[0], (*C.char)(unsafe.Pointer(&header[0])), C.size_t(len(header)), pass)
	k.changed(key)
	return nil
}

func (k *keyspace) Copy(dst, src string) error {
	return k.Run(&tensordb.Task{
		Reads: []string{src},
		Plan: func(reads []*tensordb.Meta) (tensordb.Plan, error) {
			m := *reads[0]
			return tensordb.Plan{Writes: []tensordb.Output{{Key: dst, Meta: m}}, Span: m.Len() * m.DType.Size(), Weight: 2}, nil
		},
		Compute: func(d, s [][]byte, lo, hi int) { copy(d[0][lo:hi], s[0][lo:]) },
	})
}

func (k *keyspace) Rename(dst, src string) error {
	from, to := namesOf([]string{src}), namesOf([]string{dst})
	if err := k.lockToWrite(); err != nil {
		return err
	}
	defer k.unlock()
	from.open()
	metas, err := from.metas(k, []string{src})
	if err != nil {
		return err
	}
	if metas[0] == nil {
		return noKey(src)
	}
	replicate := C.int(1)
	if metas[0].Gradient {
		replicate = 0
	}
	k.forget(dst)
	moved := k.replaced(src)
	if C.spirt_rename((*C.char)(unsafe.Pointer(&to.text[0])), to.lens[0], (*C.char)(unsafe.Pointer(&from.text[0])), from.lens[0], replicate) != 0 {
		if moved != nil {
			C.spirt_free_string(moved)
		}
		return fmt.Errorf("the server does not rename %q to %q", src, dst)
	}
	if moved != nil {
		k.keep(dst, moved)
	}
	k.changed(src)
	k.changed(dst)
	return nil
}

// Delete removes tensors; a key that is anything else stays.
func (k *keyspace) Delete(keys ...string) int {
	found := 0
	if k.lockToWrite() != nil {
		return 0
	}
	for _, key := range keys {
		n := namesOf([]string{key})
		n.open()
		if metas, err := n.metas(k, []string{key}); err != nil || metas[0] == nil {
			continue
		}
		old := k.replaced(key)
		found += int(C.spirt_delete((*C.char)(unsafe.Pointer(&n.text[0])), n.lens[0]))
		k.recycle(old)
	}
	k.unlock()
	for _, key := range keys {
		k.changed(key)
	}
	return found
}

func (k *keyspace) Keys(prefix string) []string {
	pattern := strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(prefix) + "*"
	p := []byte(pattern)
	keys := []string{}
	k.lock()
	defer k.unlock()
	var n C.size_t
	reply := C.spirt_keys((*C.char)(unsafe.Pointer(&p[0])), C.size_t(len(p)), &n)
	if reply == nil {
		return keys
	}
	for i := range n {
		var size C.size_t
		var element *C.RedisModuleCallReply
		if s := C.spirt_element(reply, i, &size, &element); s != nil {
			keys = append(keys, C.GoStringN(s, C.int(size)))
		}
	}
	C.spirt_free_reply(reply)
	slices.Sort(keys)
	return keys
}

func (k *keyspace) Expire(key string, at time.Time) bool {
	n := namesOf([]string{key})
	ms := C.longlong(-1)
	if !at.IsZero() {
		ms = C.longlong(at.UnixMilli())
	}
	if k.lockToWrite() != nil {
		return false
	}
	defer k.unlock()
	return C.spirt_expire((*C.char)(unsafe.Pointer(&n.text[0])), n.lens[0], ms) != 0
}

func (k *keyspace) Expiry(key string) (at time.Time, ok bool) {
	n := namesOf([]string{key})
	k.lock()
	defer k.unlock()
	ms := C.spirt_expiry((*C.char)(unsafe.Pointer(&n.text[0])), n.lens[0])
	if ms < 0 {
		return time.Time{}, ms == -1
	}
	return time.UnixMilli(int64(ms)), true
}

// Usage is the server's own matter: INFO tells it.
func (k *keyspace) Usage() tensordb.Usage { return tensordb.Usage{LastVersion: k.last.Load()} }

func (k *keyspace) Close() error { return nil }

// payload is the last argument of a command, which the server leaves alone
// until it is released.
type payload struct {
	string *C.RedisModuleString
	bytes  []byte
	space  *keyspace
	held   atomic.Int32
}

func (k *keyspace) hold(ctx *C.RedisModuleCtx, s *C.RedisModuleString) *payload {
	p := &payload{string: C.spirt_hold(ctx, s), space: k}
	p.bytes = bytesOf(p.string)
	p.held.Store(1)
	return p
}

// release gives up one hold; nil is none.
func (k *keyspace) release(p *payload) {
	if p != nil && p.held.Add(-1) == 0 {
		k.free(p.string)
	}
}

func (p *payload) Size() (int, error) { return len(p.bytes), nil }

func (p *payload) Read(dst []byte, check func(part []byte, offset int)) error {
	copy(dst, p.bytes)
	if check != nil {
		check(dst, 0)
	}
	return nil
}

func (p *payload) Hold() (data []byte, release func()) {
	p.held.Add(1)
	return p.bytes, func() { p.space.release(p) }
}

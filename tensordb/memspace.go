package tensordb

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// memspace is the Keyspace in this process's memory. A tensor is never changed
// once it can be read; what is replaced lives on until its last reader is
// done.
type memspace struct {
	mem     *memory
	drop    bool // gradients where memory is short
	changed func(key string)

	mu      sync.RWMutex // guards what follows; tensor data is immutable
	tensors map[string]*version
	last    uint64 // version number given out last
	closed  bool

	clock atomic.Int64 // counts uses
}

// version is one version of a tensor. It does not change.
type version struct {
	blob    *blob
	meta    Meta
	expires time.Time // zero: never
	timer   *time.Timer
	used    atomic.Int64 // the clock when it was read last
}

func newMemspace(mem *memory, drop bool, changed func(key string)) *memspace {
	return &memspace{
		mem: mem, drop: drop, changed: changed, tensors: make(map[string]*version),
		// Version numbers go on from the clock in microseconds, so that after
		// a restart none names other bytes than before it, although nothing
		// is written to disk: writes take longer than a microsecond.
		last: uint64(time.Now().UnixMicro()),
	}
}

// Close drops all tensors.
func (s *memspace) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for key := range s.tensors {
		s.removeLocked(key)
	}
	return nil
}

// at returns the current version of key, nil if there is none. s.mu is held.
func (s *memspace) at(key string) *version {
	v := s.tensors[key]
	if v == nil || !v.expires.IsZero() && !time.Now().Before(v.expires) {
		return nil
	}
	return v
}

// putLocked makes v, whose blob it takes over, the current version of key.
func (s *memspace) putLocked(key string, v *version) uint64 {
	s.last++
	v.meta.Version = s.last
	s.removeLocked(key)
	s.tensors[key] = v
	v.used.Store(s.clock.Add(1))
	return s.last
}

func (s *memspace) removeLocked(key string) {
	if v := s.tensors[key]; v != nil {
		if v.timer != nil {
			v.timer.Stop()
		}
		v.blob.release()
		delete(s.tensors, key)
	}
}

func (s *memspace) Stat(keys ...string) ([]*Meta, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, ErrClosed
	}
	metas := make([]*Meta, len(keys))
	for i, key := range keys {
		if v := s.at(key); v != nil {
			metas[i] = &v.meta
		}
	}
	return metas, nil
}

func (s *memspace) Get(keys ...string) ([]*Ref, error) {
	versions, err := s.pin(keys, 0)
	if err != nil {
		return nil, err
	}
	refs := make([]*Ref, len(keys))
	for i, v := range versions {
		refs[i] = NewRef(v.meta, v.blob.data, v.blob.sum, v.blob.release)
	}
	return refs, nil
}

func (s *memspace) Range(key string, start, count int) (*Ref, error) {
	versions, err := s.pin([]string{key}, 0)
	if err != nil {
		return nil, err
	}
	v := versions[0]
	lo := min(start, len(v.blob.data))
	return NewRef(v.meta, v.blob.data[lo:lo+min(count, len(v.blob.data)-lo)], nil, v.blob.release), nil
}

// pin returns the current versions of all keys at one moment and retains
// them. The last optional ones may be missing, and are nil then.
func (s *memspace) pin(keys []string, optional int) ([]*version, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, ErrClosed
	}
	versions := make([]*version, len(keys))
	for i, key := range keys {
		if versions[i] = s.at(key); versions[i] == nil && i < len(keys)-optional {
			return nil, noKey(key)
		}
	}
	for _, v := range versions {
		if v != nil {
			v.blob.retain()
			v.used.Store(s.clock.Add(1))
		}
	}
	return versions, nil
}

func unpin(versions []*version) {
	for _, v := range versions {
		if v != nil {
			v.blob.release()
		}
	}
}

func (s *memspace) Alloc(n int) (Buffer, error) { return s.alloc(n) }

// alloc returns a blob, for which gradients make room where that is wanted.
func (s *memspace) alloc(n int) (*blob, error) {
	for {
		b, err := s.mem.alloc(n)
		if err == nil || !s.drop || !s.dropGradient() {
			return b, err
		}
	}
}

// alloc returns a blob that is not in the Keyspace, for which gradients there
// make room where that is wanted.
func (db *DB) alloc(n int) (*blob, error) {
	if db.memory != nil {
		return db.memory.alloc(n)
	}
	return db.mem.alloc(n)
}

// dropGradient removes the gradient that was used least recently, and reports
// whether there was one.
func (s *memspace) dropGradient() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	oldest := ""
	for key, v := range s.tensors {
		if v.meta.Gradient && (oldest == "" || v.used.Load() < s.tensors[oldest].used.Load()) {
			oldest = key
		}
	}
	if oldest == "" {
		return false
	}
	s.removeLocked(oldest)
	s.changed(oldest)
	return true
}

func (s *memspace) Put(key string, meta Meta, b Buffer) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		b.Release()
		return 0, ErrClosed
	}
	number := s.putLocked(key, &version{blob: b.(*blob), meta: meta})
	s.changed(key)
	return number, nil
}

// Run works on versions that nobody changes, without the lock.
func (s *memspace) Run(t *Task) error {
	for {
		done, err := s.try(t)
		if done || err != nil {
			return err
		}
	}
}

func (s *memspace) try(t *Task) (done bool, err error) {
	reads, err := s.pin(t.Reads, t.Optional)
	if err != nil {
		return false, err
	}
	defer unpin(reads)
	metas, src := make([]*Meta, len(reads)), make([][]byte, len(reads))
	for i, v := range reads {
		if v != nil {
			metas[i], src[i] = &v.meta, v.blob.data
		}
	}
	plan, err := t.Plan(metas)
	if err != nil || plan.Nothing {
		return true, err
	}
	blobs, dst := make([]*blob, 0, len(plan.Writes)), make([][]byte, len(plan.Writes))
	defer func() {
		for _, b := range blobs {
			b.release()
		}
	}()
	for i, w := range plan.Writes {
		b, err := s.alloc(w.Meta.Len() * w.Meta.DType.Size())
		if err != nil {
			return false, err
		}
		blobs, dst[i] = append(blobs, b), b.data
	}
	if plan.Span > 0 {
		t.Compute(dst, src, 0, plan.Span)
	}
	if t.Check != nil {
		if err := t.Check(); err != nil {
			return false, err
		}
	}
	if len(plan.Writes) == 0 {
		return true, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false, ErrClosed
	}
	for i, key := range t.Reads {
		if t.Guarded && s.at(key) != reads[i] {
			return false, nil
		}
	}
	t.Versions = t.Versions[:0]
	for i, w := range plan.Writes {
		t.Versions = append(t.Versions, s.putLocked(w.Key, &version{blob: blobs[i].retain(), meta: w.Meta}))
		s.changed(w.Key)
	}
	return true, nil
}

func (s *memspace) Edit(key string, edit func(*Meta)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.at(key)
	switch {
	case s.closed:
		return ErrClosed
	case v == nil:
		return noKey(key)
	}
	meta, expires := v.meta, v.expires
	edit(&meta)
	s.putLocked(key, &version{blob: v.blob.retain(), meta: meta})
	s.expireLocked(key, expires)
	s.changed(key)
	return nil
}

func (s *memspace) Copy(dst, src string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.at(src)
	switch {
	case s.closed:
		return ErrClosed
	case v == nil:
		return noKey(src)
	}
	s.putLocked(dst, &version{blob: v.blob.retain(), meta: v.meta})
	s.changed(dst)
	return nil
}

func (s *memspace) Rename(dst, src string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.at(src)
	switch {
	case s.closed:
		return ErrClosed
	case v == nil:
		return noKey(src)
	}
	expires, blob := v.expires, v.blob.retain()
	s.removeLocked(src)
	s.putLocked(dst, &version{blob: blob, meta: v.meta})
	s.expireLocked(dst, expires)
	s.changed(src)
	s.changed(dst)
	return nil
}

func (s *memspace) Delete(keys ...string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, key := range keys {
		if s.at(key) != nil {
			n++
			s.last++ // whoever saves what has changed sees that
		}
		s.removeLocked(key)
		s.changed(key)
	}
	return n
}

func (s *memspace) Keys(prefix string) []string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	keys := []string{}
	for key := range s.tensors {
		if strings.HasPrefix(key, prefix) && s.at(key) != nil {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

func (s *memspace) Expire(key string, at time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.at(key) == nil {
		return false
	}
	s.expireLocked(key, at)
	s.last++ // as in Delete
	return true
}

// expireLocked sets when the current version of key is removed, by a timer
// that the next version stops.
func (s *memspace) expireLocked(key string, at time.Time) {
	v := s.tensors[key]
	if v.timer != nil {
		v.timer.Stop()
		v.timer = nil
	}
	if v.expires = at; at.IsZero() {
		return
	}
	v.timer = time.AfterFunc(time.Until(at), func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.tensors[key] == v && v.expires.Equal(at) {
			s.removeLocked(key)
			s.changed(key)
		}
	})
}

func (s *memspace) Expiry(key string) (at time.Time, ok bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	v := s.at(key)
	if v == nil {
		return time.Time{}, false
	}
	return v.expires, true
}

func (s *memspace) Usage() Usage {
	s.mu.RLock()
	defer s.mu.RUnlock()
	used, free := s.mem.usage()
	return Usage{Tensors: len(s.tensors), Used: used, Free: free, Limit: s.mem.limit, LastVersion: s.last}
}

func noKey(key string) error { return fmt.Errorf("%w: %q", ErrNoKey, key) }

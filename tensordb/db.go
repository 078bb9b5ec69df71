// Package tensordb is the tensor database of one peer: it holds named tensors
// in memory, averages gradients, applies optimizers and writes checkpoints,
// all in place, so that functions that keep no state need not fetch, compute
// and store them back.
//
// Open a DB and use its methods from the peer itself; start a Server on the
// same DB for functions, which speak RESP (docs/tensordb.md lists the
// commands).
//
// Guarantees. A tensor is never changed once it can be read: a write makes a
// new version, and a Ref keeps the version it was taken from alive and
// unchanged until Release. A refused write changes nothing. A minibatch is
// counted once however often its gradient arrives, and the sum is taken in
// minibatch order; an optimizer step is applied once however often it is asked
// for: so retries are safe, and one seed gives one sequence of bits. Nothing
// but checkpoints survives the process.
//
// Limits. One process, one machine: there is no replication. All bytes,
// including those that are being received, count against Config.MaxMemory.
package tensordb

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/tensor"
)

// The errors that callers tell apart. They come wrapped, with the key and the
// numbers concerned.
var (
	ErrNoKey        = errors.New("no such key")
	ErrWrongType    = errors.New("wrong type or shape")
	ErrOutOfRange   = errors.New("out of range")
	ErrNotFinite    = errors.New("not finite")
	ErrIncomplete   = errors.New("minibatches are missing")
	ErrMemory       = errors.New("out of database memory")
	ErrClosed       = errors.New("the database is closed")
	ErrNoCheckpoint = errors.New("no checkpoint")
)

// maxKey bounds the length of a key in bytes.
const maxKey = 512

// Config says how to open a database.
type Config struct {
	// Dir is the folder of the checkpoints; it is made if it does not exist.
	// Empty: no checkpoints.
	Dir string
	// MaxMemory bounds the bytes of all tensors, buffers in reserve included.
	// Zero: no bound.
	MaxMemory int64
	// Logger receives what a person may want to know, such as a damaged
	// checkpoint that was passed over. Nil: nothing is logged.
	Logger *slog.Logger
}

// DB is an open database. It is safe for concurrent use.
type DB struct {
	config Config
	log    *slog.Logger
	mem    memory

	mu           sync.RWMutex // guards the maps; tensor data is immutable
	tensors      map[string]*version
	accumulators map[string]*accumulator
	last         uint64 // version number given out last
	closed       bool

	checkpointMu sync.Mutex // one checkpoint is written at a time
}

// version is one version of a tensor. It does not change.
type version struct {
	blob   *blob
	dtype  tensor.DType
	shape  []int
	number uint64
	step   uint64 // optimizer steps applied, of a state tensor
}

func (v *version) tensor() tensor.Tensor {
	return tensor.Tensor{DType: v.dtype, Shape: v.shape, Data: v.blob.data}
}

// Open opens a database, which is empty: call Recover to load a checkpoint.
func Open(config Config) (*DB, error) {
	if config.MaxMemory < 0 {
		return nil, fmt.Errorf("opening a tensor database: a memory limit of %d bytes is negative", config.MaxMemory)
	}
	if config.Dir != "" {
		if err := os.MkdirAll(config.Dir, 0o700); err != nil {
			return nil, fmt.Errorf("opening a tensor database: %w", err)
		}
	}
	db := &DB{
		config:       config,
		log:          config.Logger,
		mem:          memory{limit: config.MaxMemory, pool: make(map[int][][]byte)},
		tensors:      make(map[string]*version),
		accumulators: make(map[string]*accumulator),
		// Version numbers go on from the clock in microseconds, so that after
		// a restart none names other bytes than before it, although nothing
		// is written to disk: writes take longer than a microsecond.
		last: uint64(time.Now().UnixMicro()),
	}
	if db.log == nil {
		db.log = slog.New(slog.DiscardHandler)
	}
	return db, nil
}

// Close drops all tensors. References that are still held stay valid.
func (db *DB) Close() error {
	db.mu.Lock()
	db.closed = true
	for _, v := range db.tensors {
		v.blob.release()
	}
	clear(db.tensors)
	accumulators := slices.Collect(maps.Values(db.accumulators))
	clear(db.accumulators)
	db.mu.Unlock()
	for _, a := range accumulators {
		a.close()
	}
	return nil
}

// Set stores a copy of t under key and returns its version. Version numbers
// come from one counter of the whole database: a key and a version never name
// two contents.
func (db *DB) Set(key string, t tensor.Tensor) (uint64, error) {
	if err := checkKey(key); err != nil {
		return 0, err
	}
	if err := t.Validate(); err != nil {
		return 0, fmt.Errorf("setting %q: %w: %w", key, ErrWrongType, err)
	}
	b, err := db.mem.alloc(len(t.Data))
	if err != nil {
		return 0, fmt.Errorf("setting %q: %w", key, err)
	}
	copy(b.data, t.Data)
	return db.put(key, &version{blob: b, dtype: t.DType, shape: slices.Clone(t.Shape)})
}

// put makes v, whose blob it takes over, the current version of key.
func (db *DB) put(key string, v *version) (uint64, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.closed {
		v.blob.release()
		return 0, ErrClosed
	}
	db.putLocked(key, v)
	return v.number, nil
}

func (db *DB) putLocked(key string, v *version) {
	db.last++
	v.number = db.last
	if old := db.tensors[key]; old != nil {
		old.blob.release()
	}
	db.tensors[key] = v
}

// Ref is a version of a tensor that is kept as it is until Release.
type Ref struct {
	v        *version
	released atomic.Bool
}

// Tensor returns the tensor. Its bytes and shape must not be changed, and not
// be used after Release.
func (r *Ref) Tensor() tensor.Tensor { return r.v.tensor() }

// Version returns the version number.
func (r *Ref) Version() uint64 { return r.v.number }

// Step returns the optimizer steps that made this version, if it is the state
// of an Update; else 0.
func (r *Ref) Step() uint64 { return r.v.step }

// Hash returns the tree hash of the bytes. It is computed at most once.
func (r *Ref) Hash() treehash.Hash { return r.v.blob.sum() }

// Release gives the reference back. Calling it again does nothing.
func (r *Ref) Release() {
	if !r.released.Swap(true) {
		r.v.blob.release()
	}
}

// Get returns the current version of key, or ErrNoKey. Release it.
func (db *DB) Get(key string) (*Ref, error) {
	db.mu.RLock()
	defer db.mu.RUnlock()
	return db.getLocked(key)
}

func (db *DB) getLocked(key string) (*Ref, error) {
	if db.closed {
		return nil, ErrClosed
	}
	v := db.tensors[key]
	if v == nil {
		return nil, noKey(key)
	}
	v.blob.retain()
	return &Ref{v: v}, nil
}

// getAll returns the current versions of all keys at one moment.
func (db *DB) getAll(keys ...string) ([]*Ref, error) {
	db.mu.RLock()
	defer db.mu.RUnlock()
	refs := make([]*Ref, 0, len(keys))
	for _, key := range keys {
		ref, err := db.getLocked(key)
		if err != nil {
			releaseAll(refs)
			return nil, err
		}
		refs = append(refs, ref)
	}
	return refs, nil
}

func releaseAll(refs []*Ref) {
	for _, r := range refs {
		r.Release()
	}
}

// Delete removes tensors and accumulators, and returns how many keys there
// were.
func (db *DB) Delete(keys ...string) int {
	var closing []*accumulator
	n := 0
	db.mu.Lock()
	for _, key := range keys {
		v, a := db.tensors[key], db.accumulators[key]
		if v != nil {
			v.blob.release()
			delete(db.tensors, key)
		}
		if a != nil {
			closing = append(closing, a)
			delete(db.accumulators, key)
		}
		if v != nil || a != nil {
			n++
		}
	}
	db.mu.Unlock()
	for _, a := range closing {
		a.close()
	}
	return n
}

// Exists reports whether there is a tensor under key.
func (db *DB) Exists(key string) bool {
	db.mu.RLock()
	defer db.mu.RUnlock()
	return db.tensors[key] != nil
}

// Keys returns the keys of all tensors that start with prefix, sorted.
func (db *DB) Keys(prefix string) []string {
	db.mu.RLock()
	defer db.mu.RUnlock()
	keys := []string{}
	for key := range db.tensors {
		if strings.HasPrefix(key, prefix) {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys
}

// Copy makes dst a tensor with the bytes and the optimizer step of src. It
// copies no bytes.
func (db *DB) Copy(dst, src string) error {
	if err := checkKey(dst); err != nil {
		return err
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	ref, err := db.getLocked(src)
	if err != nil {
		return err
	}
	db.putLocked(dst, &version{blob: ref.v.blob, dtype: ref.v.dtype, shape: ref.v.shape, step: ref.v.step})
	return nil
}

// Rename makes dst what src was, and removes src.
func (db *DB) Rename(dst, src string) error {
	if err := checkKey(dst); err != nil {
		return err
	}
	db.mu.Lock()
	defer db.mu.Unlock()
	v := db.tensors[src]
	if db.closed {
		return ErrClosed
	}
	if v == nil {
		return noKey(src)
	}
	delete(db.tensors, src)
	db.putLocked(dst, &version{blob: v.blob, dtype: v.dtype, shape: v.shape, step: v.step})
	return nil
}

// Hash returns the tree hash of the raw bytes of key. It is computed once for
// each content.
func (db *DB) Hash(key string) (treehash.Hash, error) {
	ref, err := db.Get(key)
	if err != nil {
		return treehash.Hash{}, err
	}
	defer ref.Release()
	return ref.Hash(), nil
}

// Rows appends rows of key, along its first dimension, to dst.
func (db *DB) Rows(dst []byte, key string, rows []int) ([]byte, error) {
	ref, err := db.Get(key)
	if err != nil {
		return dst, err
	}
	defer ref.Release()
	t := ref.Tensor()
	size, err := rowSize(key, t)
	if err != nil {
		return dst, err
	}
	for i, row := range rows {
		if row < 0 || row >= t.Shape[0] {
			return dst, fmt.Errorf("%w: row %d (the %d. asked for) of %q, which has %d rows", ErrOutOfRange, row, i+1, key, t.Shape[0])
		}
	}
	dst = slices.Grow(dst, size*len(rows))
	for _, row := range rows {
		dst = append(dst, t.Data[row*size:(row+1)*size]...)
	}
	return dst, nil
}

// rowSize returns the bytes of one row of t.
func rowSize(key string, t tensor.Tensor) (int, error) {
	if len(t.Shape) == 0 {
		return 0, fmt.Errorf("%w: %q is a single number and has no rows", ErrWrongType, key)
	}
	if t.Shape[0] == 0 {
		return 0, nil
	}
	return len(t.Data) / t.Shape[0], nil
}

// Stats is how much the database holds.
type Stats struct {
	Keys, Accumulators int
	MemoryUsed         int64 // bytes of tensors, accumulators and transfers
	MemoryFree         int64 // bytes kept for reuse
	MemoryLimit        int64 // 0: none
	LastVersion        uint64
}

// Stats returns how much the database holds now.
func (db *DB) Stats() Stats {
	db.mu.RLock()
	defer db.mu.RUnlock()
	live, free := db.mem.usage()
	return Stats{
		Keys: len(db.tensors), Accumulators: len(db.accumulators),
		MemoryUsed: live, MemoryFree: free, MemoryLimit: db.mem.limit, LastVersion: db.last,
	}
}

func checkKey(key string) error {
	if len(key) == 0 || len(key) > maxKey {
		return fmt.Errorf("%w: a key of %d bytes, 1 to %d are allowed", ErrOutOfRange, len(key), maxKey)
	}
	return nil
}

func noKey(key string) error { return fmt.Errorf("%w: %q", ErrNoKey, key) }

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
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
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
	// DropGradients has gradients removed, the least recently used first,
	// where memory is short. The default is to refuse what needs more.
	DropGradients bool
	// Logger receives what a person may want to know, such as a damaged
	// checkpoint that was passed over. Nil: nothing is logged.
	Logger *slog.Logger
	// Keyspace is where tensors lie that are not in this process's memory; it
	// is told what Changed tells the DB. MaxMemory bounds accumulators and
	// what is read then, and there are no checkpoints. Nil: in memory.
	Keyspace Keyspace
}

// DB is an open database. It is safe for concurrent use.
type DB struct {
	config Config
	log    *slog.Logger
	files  files
	mem    memory
	space  Keyspace
	memory *memspace // space, where that is in memory; else nil

	mu           sync.RWMutex // guards what follows
	accumulators map[string]*accumulator
	closed       bool

	waitMu  sync.Mutex
	waiting map[string]map[chan struct{}]bool // closed when the key changes

	engine engine // that trains

	checkpointMu sync.Mutex // one checkpoint is written at a time
}

// Open opens a database, which is empty: call Recover to load a checkpoint.
func Open(config Config) (*DB, error) { return openOn(disk{}, config) }

func openOn(fs files, config Config) (*DB, error) {
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
		files:        fs,
		mem:          memory{limit: config.MaxMemory, pool: make(map[int][][]byte)},
		space:        config.Keyspace,
		accumulators: make(map[string]*accumulator),
		waiting:      make(map[string]map[chan struct{}]bool),
	}
	if db.log == nil {
		db.log = slog.New(slog.DiscardHandler)
	}
	if db.space == nil {
		db.memory = newMemspace(&db.mem, config.DropGradients, db.Changed)
		db.space = db.memory
	}
	if config.Dir != "" {
		db.removeTemporary()
	}
	return db, nil
}

// Close drops all tensors. References that are still held stay valid.
func (db *DB) Close() error {
	db.mu.Lock()
	db.closed = true
	accumulators := slices.Collect(maps.Values(db.accumulators))
	clear(db.accumulators)
	db.mu.Unlock()
	for _, a := range accumulators {
		a.close()
	}
	err := db.space.Close()
	db.mem.close()
	return err
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
	b, err := db.space.Alloc(len(t.Data))
	if err != nil {
		return 0, fmt.Errorf("setting %q: %w", key, err)
	}
	copy(b.Data(), t.Data)
	return db.space.Put(key, Meta{DType: t.DType, Shape: slices.Clone(t.Shape)}, b)
}

// Get returns the current version of key, or ErrNoKey. Release it.
func (db *DB) Get(key string) (*Ref, error) {
	refs, err := db.space.Get(key)
	if err != nil {
		return nil, err
	}
	return refs[0], nil
}

// Stat returns what is known of a tensor, or ErrNoKey.
func (db *DB) Stat(key string) (Meta, error) {
	metas, err := db.space.Stat(key)
	if err != nil {
		return Meta{}, err
	}
	if metas[0] == nil {
		return Meta{}, noKey(key)
	}
	return *metas[0], nil
}

// Delete removes tensors and accumulators, and returns how many keys there
// were.
func (db *DB) Delete(keys ...string) int {
	var closing []*accumulator
	n := db.space.Delete(keys...)
	db.mu.Lock()
	for _, key := range keys {
		if a := db.accumulators[key]; a != nil {
			closing = append(closing, a)
			delete(db.accumulators, key)
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
	_, err := db.Stat(key)
	return err == nil
}

// Keys returns the keys of all tensors that start with prefix, sorted.
func (db *DB) Keys(prefix string) []string { return db.space.Keys(prefix) }

// Copy makes dst a tensor with the bytes, the optimizer step and the kind of
// src. In memory it copies no bytes.
func (db *DB) Copy(dst, src string) error {
	if err := checkKey(dst); err != nil {
		return err
	}
	return db.space.Copy(dst, src)
}

// Rename makes dst what src was, and removes src.
func (db *DB) Rename(dst, src string) error {
	if err := checkKey(dst); err != nil {
		return err
	}
	return db.space.Rename(dst, src)
}

// Expire has a tensor removed at a time, the zero time for never, and reports
// whether there is one. A new version is kept again.
func (db *DB) Expire(key string, at time.Time) bool { return db.space.Expire(key, at) }

// Expiry returns when a tensor is removed, the zero time for never, and
// whether there is one.
func (db *DB) Expiry(key string) (at time.Time, ok bool) { return db.space.Expiry(key) }

// SetStep notes that the tensor under key is the state of an optimizer after
// so many steps, as Update would have left it: for a state that comes from
// elsewhere.
func (db *DB) SetStep(key string, step uint64) error {
	return db.space.Edit(key, func(m *Meta) { m.Step = step })
}

// SetGradient says whether the tensor under key is one that can be computed
// again: it may be dropped where memory is short, and is not replicated.
func (db *DB) SetGradient(key string, gradient bool) error {
	return db.space.Edit(key, func(m *Meta) { m.Gradient = gradient })
}

// Changed wakes those that wait for key. A Keyspace calls it after each write
// and removal.
func (db *DB) Changed(key string) {
	db.waitMu.Lock()
	defer db.waitMu.Unlock()
	for c := range db.waiting[key] {
		close(c)
	}
	delete(db.waiting, key)
}

// Wait waits until the version of key is another than the one given, 0 for no
// tensor, and returns it; or until ctx ends, whose error it returns.
func (db *DB) Wait(ctx context.Context, key string, version uint64) (uint64, error) {
	for {
		c := make(chan struct{})
		db.waitMu.Lock()
		if db.waiting[key] == nil {
			db.waiting[key] = make(map[chan struct{}]bool)
		}
		db.waiting[key][c] = true
		db.waitMu.Unlock()
		now, err := db.version(key)
		if err == nil && now == version {
			select {
			case <-c:
				continue
			case <-ctx.Done():
				err = ctx.Err()
			}
		}
		db.waitMu.Lock()
		if delete(db.waiting[key], c); len(db.waiting[key]) == 0 {
			delete(db.waiting, key)
		}
		db.waitMu.Unlock()
		return now, err
	}
}

// version returns the version of key, 0 if there is no tensor.
func (db *DB) version(key string) (uint64, error) {
	metas, err := db.space.Stat(key)
	if err != nil || metas[0] == nil {
		return 0, err
	}
	return metas[0].Version, nil
}

// Hash returns the tree hash of the raw bytes of key. In memory it is computed
// once for each content.
func (db *DB) Hash(key string) (treehash.Hash, error) {
	ref, err := db.Get(key)
	if err != nil {
		return treehash.Hash{}, err
	}
	defer ref.Release()
	return ref.Hash(), nil
}

// Range returns count bytes of the current version of key from byte start,
// fewer at its end. Release it.
func (db *DB) Range(key string, start, count int) (*Ref, error) {
	return db.space.Range(key, start, count)
}

// Rows appends rows of key, along its first dimension, to dst.
func (db *DB) Rows(dst []byte, key string, rows []int) ([]byte, error) {
	return db.rows(dst, key, rows, nil)
}

// rows is Rows where check, if not nil, may refuse the tensor before memory is
// taken for its rows of size bytes.
func (db *DB) rows(dst []byte, key string, rows []int, check func(m *Meta, size int) error) ([]byte, error) {
	size, at := 0, len(dst)
	err := db.space.Run(&Task{
		Reads: []string{key},
		Plan: func(reads []*Meta) (Plan, error) {
			var err error
			if size, err = rowSize(key, *reads[0]); err != nil {
				return Plan{}, err
			}
			if check != nil {
				if err := check(reads[0], size); err != nil {
					return Plan{}, err
				}
			}
			for i, row := range rows {
				if row < 0 || row >= reads[0].Shape[0] {
					return Plan{}, fmt.Errorf("%w: row %d (the %d. asked for) of %q, which has %d rows", ErrOutOfRange, row, i+1, key, reads[0].Shape[0])
				}
			}
			dst = slices.Grow(dst[:at], size*len(rows))[:at+size*len(rows)]
			return Plan{Span: len(rows), Weight: 2 * size}, nil
		},
		Compute: func(_, src [][]byte, lo, hi int) {
			for i := lo; i < hi; i++ {
				copy(dst[at+i*size:at+(i+1)*size], src[0][rows[i]*size:])
			}
		},
	})
	if err != nil {
		return dst[:at], err
	}
	return dst, nil
}

// rowSize returns the bytes of one row.
func rowSize(key string, m Meta) (int, error) {
	if len(m.Shape) == 0 {
		return 0, fmt.Errorf("%w: %q is a single number and has no rows", ErrWrongType, key)
	}
	if m.Shape[0] == 0 {
		return 0, nil
	}
	return m.Len() * m.DType.Size() / m.Shape[0], nil
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
	accumulators := len(db.accumulators)
	db.mu.RUnlock()
	u := db.space.Usage()
	return Stats{Keys: u.Tensors, Accumulators: accumulators, MemoryUsed: u.Used, MemoryFree: u.Free, MemoryLimit: u.Limit, LastVersion: u.LastVersion}
}

func checkKey(key string) error {
	if len(key) == 0 || len(key) > maxKey {
		return fmt.Errorf("%w: a key of %d bytes, 1 to %d are allowed", ErrOutOfRange, len(key), maxKey)
	}
	return nil
}

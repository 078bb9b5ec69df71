package tensordb

import (
	"sync/atomic"
	"time"

	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/tensor"
)

// Meta is what a database knows of a tensor beside its bytes.
type Meta struct {
	DType   tensor.DType
	Shape   []int  // not to be changed
	Version uint64 // a key and a version never name two contents; set by the Keyspace
	Step    uint64 // optimizer steps applied, of the state of an Update
	// Gradient marks what can be computed again: it may be dropped where
	// memory is short, and is not replicated. All else is kept.
	Gradient bool
}

// Len returns the number of elements.
func (m *Meta) Len() int { return tensor.Tensor{Shape: m.Shape}.Len() }

// Keyspace is where the tensors of a database lie: in this process's memory,
// or in a Redis server. Its methods may be called from several goroutines.
// Errors wrap this package's.
type Keyspace interface {
	// Stat returns what is known of each key, nil where there is no tensor.
	Stat(keys ...string) ([]*Meta, error)
	// Get returns the current versions of all keys at one moment, or an error
	// that wraps ErrNoKey. Release each.
	Get(keys ...string) ([]*Ref, error)
	// Range returns count bytes of the current version of key from byte start,
	// fewer at its end. Release it.
	Range(key string, start, count int) (*Ref, error)
	// Alloc returns room for n bytes of a tensor, with arbitrary content.
	Alloc(n int) (Buffer, error)
	// Put makes the buffer, which it takes over also where it fails, the
	// tensor under key, and returns its version.
	Put(key string, meta Meta, b Buffer) (uint64, error)
	// Run carries out a task.
	Run(t *Task) error
	// Edit changes the step and kind of a tensor, in a new version.
	Edit(key string, edit func(*Meta)) error
	// Copy makes dst a tensor with the bytes, step and kind of src.
	Copy(dst, src string) error
	// Rename makes dst what src was, and removes src.
	Rename(dst, src string) error
	// Delete removes tensors and returns how many there were.
	Delete(keys ...string) int
	// Keys returns the keys that start with prefix, sorted.
	Keys(prefix string) []string
	// Expire has a tensor removed at a time, the zero time for never, and
	// reports whether there is one. A new version is kept again.
	Expire(key string, at time.Time) bool
	// Expiry returns when a tensor is removed, the zero time for never, and
	// whether there is one.
	Expiry(key string) (at time.Time, ok bool)
	// Usage returns how much there is.
	Usage() Usage
	// Close drops what can be dropped. References stay valid.
	Close() error
}

// Usage is how much a Keyspace holds.
type Usage struct {
	Tensors     int
	Used        int64  // bytes of tensors and transfers
	Free        int64  // bytes kept for reuse
	Limit       int64  // bytes; 0: none
	LastVersion uint64 // given out last
}

// Buffer is memory that becomes a tensor. It has one owner.
type Buffer interface {
	// Data returns the bytes. They may start at any address.
	Data() []byte
	// Release gives the memory back unused.
	Release()
}

// Task makes tensors of tensors.
type Task struct {
	// Reads are the keys of what is read. The last Optional of them may be
	// missing.
	Reads    []string
	Optional int
	// Guarded: what was read must still be current when the results are
	// stored. If it is not, the task is carried out again.
	Guarded bool
	// Plan says what there is to do. It may be called again, when the task is
	// carried out again. A meta is nil where an optional key is missing.
	Plan func(reads []*Meta) (Plan, error)
	// Compute works on the part [lo, hi) of the span. The parts follow one
	// another from 0; all but the last are multiples of 16384. The slices are
	// whole tensors, valid during the call, nil where an optional key is
	// missing, and may start at any address. dst has arbitrary content at
	// first.
	Compute func(dst, src [][]byte, lo, hi int)
	// Check, if not nil, is called after the last part. An error refuses the
	// task: nothing is stored.
	Check func() error
	// Versions is set by Run: those of what was stored.
	Versions []uint64
}

// Plan is what a task does.
type Plan struct {
	Writes  []Output // stored all at one moment
	Span    int      // how far Compute goes
	Weight  int      // bytes read and written for one step of the span
	Nothing bool     // there is nothing to do
}

// Output is a tensor that a task makes.
type Output struct {
	Key  string
	Meta Meta // without version
}

// Ref is a version of a tensor that is kept as it is until Release.
type Ref struct {
	meta     Meta
	data     []byte
	hash     func() treehash.Hash
	release  func()
	released atomic.Bool
}

// NewRef returns a reference for a Keyspace: data is kept as it is until
// release is called. hash, if not nil, returns the tree hash of data.
func NewRef(meta Meta, data []byte, hash func() treehash.Hash, release func()) *Ref {
	if hash == nil {
		hash = func() treehash.Hash { return treehash.Sum(data) }
	}
	return &Ref{meta: meta, data: data, hash: hash, release: release}
}

// Tensor returns the tensor. Its bytes and shape must not be changed, and not
// be used after Release.
func (r *Ref) Tensor() tensor.Tensor {
	return tensor.Tensor{DType: r.meta.DType, Shape: r.meta.Shape, Data: r.data}
}

// Meta returns what is known of the version.
func (r *Ref) Meta() Meta { return r.meta }

// Version returns the version number.
func (r *Ref) Version() uint64 { return r.meta.Version }

// Step returns the optimizer steps that made this version, if it is the state
// of an Update; else 0.
func (r *Ref) Step() uint64 { return r.meta.Step }

// Hash returns the tree hash of the bytes. It is computed at most once.
func (r *Ref) Hash() treehash.Hash { return r.hash() }

// Release gives the reference back. Calling it again does nothing.
func (r *Ref) Release() {
	if !r.released.Swap(true) {
		r.release()
	}
}

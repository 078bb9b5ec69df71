package tensordb

import (
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/spirt-ml/spirt/internal/treehash"
)

const (
	// overhead is what every tensor counts beyond its bytes: its name, shape
	// and bookkeeping. It bounds the number of tiny tensors.
	overhead = 512
	// pooledMin is the smallest buffer worth keeping for reuse.
	pooledMin = 4 << 10
	// freeMin is how many bytes of free buffers are kept in any case. Above
	// it, no more than the tensors in use have.
	freeMin = 64 << 20
)

// memory hands out buffers, counts them against a limit, and keeps released
// ones for reuse: the sizes of a training run recur every round, and a fresh
// 45 MB costs more in page faults than summing it. Large ones are mapped apart
// from Go's heap: the garbage collector neither scans nor waits for them.
type memory struct {
	limit  int64         // bytes; 0: none
	mapped atomic.Uint64 // buffers

	mu         sync.Mutex
	live, free int64
	pool       map[int][][]byte // free buffers by capacity
	closed     bool             // nothing is kept any more
}

// blob is a buffer with a count of its holders. Once it is shared its data
// does not change; the last holder to release it gives it back to the pool.
type blob struct {
	mem   *memory
	data  []byte // starts at a multiple of 8
	buf   []byte // data with its spare capacity
	count atomic.Int32
	free  func() // of memory that is somebody else's; then mem is nil

	hashOnce sync.Once
	hash     treehash.Hash
}

// alloc returns a blob of n bytes with arbitrary content and one holder.
func (m *memory) alloc(n int) (*blob, error) {
	class := sizeClass(n)
	cost := int64(class) + overhead
	m.mu.Lock()
	if m.limit > 0 && m.live+cost > m.limit {
		live := m.live
		m.mu.Unlock()
		return nil, fmt.Errorf("%w: %d bytes of %d are in use and %d more are needed; raise the database's memory limit or delete keys", ErrMemory, live, m.limit, cost)
	}
	m.live += cost
	var buf []byte
	if list := m.pool[class]; len(list) > 0 {
		buf = list[len(list)-1]
		m.pool[class] = list[:len(list)-1]
		m.free -= int64(class)
	}
	m.evict()
	m.mu.Unlock()
	if buf == nil {
		var err error
		if buf, err = m.newBuffer(class); err != nil {
			m.mu.Lock()
			m.live -= cost
			m.mu.Unlock()
			return nil, fmt.Errorf("%w: %d bytes from the system: %w", ErrMemory, class, err)
		}
	}
	b := &blob{mem: m, data: buf[:n:n], buf: buf}
	b.count.Store(1)
	return b, nil
}

// foreign returns a blob of bytes that are somebody else's, who gets them back
// by free. They must not be changed.
func foreign(data []byte, free func()) *blob {
	b := &blob{data: data, free: free}
	b.count.Store(1)
	return b
}

// reserve counts n bytes that are taken elsewhere.
func (m *memory) reserve(n int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.limit > 0 && m.live+n > m.limit {
		return fmt.Errorf("%w: %d bytes of %d are in use and %d more are needed; raise the database's memory limit or delete keys", ErrMemory, m.live, m.limit, n)
	}
	m.live += n
	m.evict()
	return nil
}

func (m *memory) unreserve(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.live -= n
}

// evict drops free buffers until the limit holds. m.mu is held.
func (m *memory) evict() {
	for class, list := range m.pool {
		for m.limit > 0 && m.live+m.free > m.limit && len(list) > 0 {
			freeBuffer(list[len(list)-1])
			list[len(list)-1] = nil
			list = list[:len(list)-1]
			m.free -= int64(class)
		}
		m.pool[class] = list
	}
}

func (m *memory) usage() (live, free int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.live, m.free
}

func (b *blob) retain() *blob {
	b.count.Add(1)
	return b
}

func (b *blob) release() {
	switch n := b.count.Add(-1); {
	case n > 0:
		return
	case n < 0:
		panic("tensordb: buffer released twice")
	}
	if b.free != nil {
		b.free()
		b.data = nil
		return
	}
	m, class := b.mem, len(b.buf)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.live -= int64(class) + overhead
	keep := max(freeMin, m.live)
	if !m.closed && class >= pooledMin && m.free+int64(class) <= keep && (m.limit == 0 || m.live+m.free+int64(class) <= m.limit) {
		m.pool[class] = append(m.pool[class], b.buf)
		m.free += int64(class)
	} else {
		freeBuffer(b.buf)
	}
	b.data, b.buf = nil, nil
}

// close gives back what is kept for reuse, and from now on what is released.
func (m *memory) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	for _, list := range m.pool {
		for _, buf := range list {
			freeBuffer(buf)
		}
	}
	clear(m.pool)
	m.free = 0
}

// mappedMin is the smallest buffer that is mapped.
const mappedMin = 64 << 10

func (m *memory) newBuffer(n int) ([]byte, error) {
	if n >= mappedMin {
		return mapBuffer(n, m.mapped.Add(1))
	}
	return make([]byte, n), nil
}

func freeBuffer(b []byte) {
	if len(b) >= mappedMin {
		unmapBuffer(b)
	}
}

// Data returns the bytes.
func (b *blob) Data() []byte { return b.data }

// Release gives a holder's part back.
func (b *blob) Release() { b.release() }

func (b *blob) floats() []float32 { return floats(b.data) }

// sum returns the tree hash of the bytes, computed at most once.
func (b *blob) sum() treehash.Hash {
	b.hashOnce.Do(func() { b.hash = treehash.Sum(b.data) })
	return b.hash
}

// sizeClass rounds n up so that buffers of nearly one size share a pool: to a
// multiple of 8 when small, else to an eighth of the power of two below.
func sizeClass(n int) int {
	if n < pooledMin {
		return max((n+7)&^7, 8)
	}
	step := 1 << (bits.Len(uint(n-1)) - 4)
	return (n + step - 1) &^ (step - 1)
}

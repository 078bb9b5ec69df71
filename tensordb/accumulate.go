package tensordb

import (
	"fmt"
	"strings"
	"sync"

	"github.com/spirt-ml/spirt/internal/kernel"
	"github.com/spirt-ml/spirt/tensor"
)

// maxMinibatches bounds the minibatches of one accumulator.
const maxMinibatches = 1 << 20

// Status tells what became of a gradient.
type Status uint8

// What can become of a gradient.
const (
	// Counted: it is in the sum.
	Counted Status = iota + 1
	// Buffered: it came early and waits for the minibatches before it.
	Buffered
	// Duplicate: that minibatch has arrived before. Nothing changed.
	Duplicate
)

// String returns the status in lower case.
func (s Status) String() string {
	switch s {
	case Counted:
		return "counted"
	case Buffered:
		return "buffered"
	case Duplicate:
		return "duplicate"
	}
	return fmt.Sprintf("status(%d)", uint8(s))
}

type progress uint8

const (
	missing progress = iota
	arrived          // counted or buffered
	skipped
)

// accumulator is the running sum of the gradients of a round.
type accumulator struct {
	key    string
	length int
	window int

	mu      sync.Mutex
	closed  bool
	next    int           // the first minibatch that is neither counted nor skipped
	counted int           // gradients in the sum
	seen    []progress    // by minibatch
	early   map[int]*blob // arrived beyond next; at most window
	sum     *blob         // nil until the first gradient; not changed once it is complete
	spare   *blob         // for the sum, where gradients are in foreign memory
}

// Accumulator makes key an empty running sum for gradients of the given
// length, replacing the one before. Gradients of minibatches 0 to
// minibatches-1 are added in this order; up to window of them may wait for an
// earlier one. Name it by round: a straggler of an old round must not find it.
func (db *DB) Accumulator(key string, length, minibatches, window int) error {
	if err := checkKey(key); err != nil {
		return err
	}
	if length < 1 || minibatches < 1 || minibatches > maxMinibatches || window < 0 {
		return fmt.Errorf("%w: accumulator %q of length %d, %d minibatches and window %d", ErrOutOfRange, key, length, minibatches, window)
	}
	a := &accumulator{
		key: key, length: length, window: min(window, minibatches),
		seen: make([]progress, minibatches), early: make(map[int]*blob),
	}
	db.mu.Lock()
	if db.closed {
		db.mu.Unlock()
		return ErrClosed
	}
	old := db.accumulators[key]
	db.accumulators[key] = a
	db.mu.Unlock()
	if old != nil {
		old.close()
	}
	return nil
}

func (db *DB) accumulator(key string) (*accumulator, error) {
	db.mu.RLock()
	defer db.mu.RUnlock()
	if db.closed {
		return nil, ErrClosed
	}
	a := db.accumulators[key]
	if a == nil {
		return nil, fmt.Errorf("%w: accumulator %q", ErrNoKey, key)
	}
	return a, nil
}

// Accumulate adds a copy of the gradient of a minibatch to the running sum, as
// soon as those before it are in. A gradient with a NaN or an infinity is
// refused with ErrNotFinite; one of another length, or of a minibatch that is
// out of range, skipped or more than window ahead, with ErrOutOfRange. A
// refused gradient changes nothing and may be sent again.
func (db *DB) Accumulate(key string, minibatch int, gradient []float32) (Status, error) {
	a, err := db.accumulator(key)
	if err != nil {
		return 0, err
	}
	if duplicate, err := a.check(minibatch, 4*len(gradient)); err != nil {
		return 0, err
	} else if duplicate {
		return Duplicate, nil
	}
	if i := kernel.FirstNonFinite(gradient); i >= 0 {
		return 0, a.notFinite(minibatch, i, gradient[i])
	}
	b, err := db.alloc(4 * len(gradient))
	if err != nil {
		return 0, fmt.Errorf("accumulating minibatch %d in %q: %w", minibatch, key, err)
	}
	copy(b.floats(), gradient)
	return a.put(&db.mem, minibatch, b)
}

func (a *accumulator) notFinite(minibatch, index int, value float32) error {
	return fmt.Errorf("%w: the gradient of minibatch %d in %q has %v at index %d; nothing was added", ErrNotFinite, minibatch, a.key, value, index)
}

// check reports whether a gradient of size bytes would be welcome.
func (a *accumulator) check(minibatch, size int) (duplicate bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if size%4 != 0 || size/4 != a.length {
		return false, fmt.Errorf("%w: the gradient of minibatch %d in %q has %d bytes, not %d", ErrOutOfRange, minibatch, a.key, size, 4*a.length)
	}
	return a.checkLocked(minibatch)
}

func (a *accumulator) checkLocked(minibatch int) (duplicate bool, err error) {
	switch {
	case a.closed:
		return false, fmt.Errorf("%w: accumulator %q was deleted or started anew", ErrNoKey, a.key)
	case minibatch < 0 || minibatch >= len(a.seen):
		return false, fmt.Errorf("%w: minibatch %d in %q, which has minibatches 0 to %d", ErrOutOfRange, minibatch, a.key, len(a.seen)-1)
	case a.seen[minibatch] == skipped:
		return false, fmt.Errorf("%w: minibatch %d in %q was skipped", ErrOutOfRange, minibatch, a.key)
	case a.seen[minibatch] == arrived:
		return true, nil
	case minibatch > a.next+a.window:
		return false, fmt.Errorf("%w: minibatch %d in %q is more than %d ahead of minibatch %d, the next to be summed; send it again later", ErrOutOfRange, minibatch, a.key, a.window, a.next)
	}
	return false, nil
}

// put adds or buffers a gradient, whose blob it takes over and which nobody
// else holds. mem has room for a sum that cannot be in the first one's blob.
func (a *accumulator) put(mem *memory, minibatch int, b *blob) (Status, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	duplicate, err := a.checkLocked(minibatch)
	if err == nil && !duplicate && b.free != nil && a.sum == nil && a.spare == nil {
		a.spare, err = mem.alloc(len(b.data))
	}
	if err != nil || duplicate {
		b.release()
		return Duplicate, err
	}
	a.seen[minibatch] = arrived
	a.early[minibatch] = b
	if minibatch != a.next {
		return Buffered, nil
	}
	a.advance()
	return Counted, nil
}

// advance sums what has come up to the first gap. a.mu is held.
func (a *accumulator) advance() {
	for ; a.next < len(a.seen) && a.seen[a.next] != missing; a.next++ {
		if a.seen[a.next] == skipped {
			continue
		}
		b := a.early[a.next]
		delete(a.early, a.next)
		a.counted++
		switch {
		case a.sum == nil && b.free == nil:
			a.sum = b // the first gradient's buffer becomes the sum
			continue
		case a.sum == nil:
			a.sum, a.spare = a.spare, nil
			copy(a.sum.data, b.data)
			b.release()
			continue
		}
		kernel.Add(a.sum.floats(), b.floats())
		b.release()
	}
}

// Skip leaves a minibatch out of the sum for good, so that those after it need
// not wait. One whose gradient has arrived stays in: Average tells how many
// were counted.
func (db *DB) Skip(key string, minibatch int) error {
	a, err := db.accumulator(key)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return fmt.Errorf("%w: accumulator %q", ErrNoKey, key)
	}
	if minibatch < 0 || minibatch >= len(a.seen) {
		return fmt.Errorf("%w: minibatch %d in %q, which has minibatches 0 to %d", ErrOutOfRange, minibatch, key, len(a.seen)-1)
	}
	if a.seen[minibatch] == missing {
		a.seen[minibatch] = skipped
		a.advance()
	}
	return nil
}

// Average stores the sum divided by the number of gradients in it under dst,
// and returns that number. The sum stays, so Average can be repeated. It is an
// error if a minibatch is neither counted nor skipped, or if none is counted.
func (db *DB) Average(dst, key string) (counted int, err error) {
	if err := checkKey(dst); err != nil {
		return 0, err
	}
	a, err := db.accumulator(key)
	if err != nil {
		return 0, err
	}
	sum, counted, err := a.total()
	if err != nil {
		return 0, fmt.Errorf("averaging %q: %w", key, err)
	}
	defer sum.release()
	bad := -1
	err = db.space.Run(&Task{
		Plan: func([]*Meta) (Plan, error) {
			bad = -1
			meta := Meta{DType: tensor.Float32, Shape: []int{a.length}, Gradient: true}
			return Plan{Writes: []Output{{dst, meta}}, Span: a.length, Weight: 8}, nil
		},
		Compute: func(d, _ [][]byte, lo, hi int) {
			to, from := floats(d[0]), sum.floats()
			tiles(lo, hi, func(lo, hi int) {
				kernel.Div(to[lo:hi], from[lo:hi], float32(counted))
				firstBad(&bad, to[lo:hi], lo)
			})
		},
		Check: func() error {
			if bad >= 0 {
				return fmt.Errorf("averaging %q: %w: the sum overflows at index %d", key, ErrNotFinite, bad)
			}
			return nil
		},
	})
	return counted, err
}

// total returns the sum, which is complete and does not change any more, and
// the number of gradients in it. Release it.
func (a *accumulator) total() (*blob, int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil, 0, fmt.Errorf("%w: accumulator %q", ErrNoKey, a.key)
	}
	if a.next < len(a.seen) {
		return nil, 0, fmt.Errorf("%w: %s of %d", ErrIncomplete, a.missing(), len(a.seen))
	}
	if a.counted == 0 {
		return nil, 0, fmt.Errorf("%w: all %d were skipped", ErrIncomplete, len(a.seen))
	}
	return a.sum.retain(), a.counted, nil
}

// missing names the first few minibatches that have not arrived.
func (a *accumulator) missing() string {
	var list []string
	for i, s := range a.seen {
		if s != missing {
			continue
		}
		if len(list) == 8 {
			list = append(list, "...")
			break
		}
		list = append(list, fmt.Sprint(i))
	}
	return strings.Join(list, ", ")
}

// close releases everything; a gradient that is under way finds it closed. It
// may wait for a sum, so the database's lock is not held.
func (a *accumulator) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	for _, b := range a.early {
		b.release()
	}
	clear(a.early)
	for _, b := range []**blob{&a.sum, &a.spare} {
		if *b != nil {
			(*b).release()
			*b = nil
		}
	}
}

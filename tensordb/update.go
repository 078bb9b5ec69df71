package tensordb

import (
	"fmt"
	"slices"

	"github.com/spirt-ml/spirt/internal/kernel"
	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/tensor"
)

// maxWeight bounds a weight of a mean: float32 holds all whole numbers below.
const maxWeight = 1 << 24

// Mean stores the mean of tensors of one shape, all float32 or all float16,
// under dst as float32. They are added in the order of keys, each times its
// weight, and divided by the sum of the weights; without weights, or where all
// are equal, they are added as they are and divided by their number.
func (db *DB) Mean(dst string, keys []string, weights []uint32) error {
	if err := checkKey(dst); err != nil {
		return err
	}
	if len(keys) == 0 {
		return fmt.Errorf("%w: the mean of no tensors", ErrOutOfRange)
	}
	w, err := checkWeights(keys, weights)
	if err != nil {
		return err
	}
	refs, err := db.getAll(keys...)
	if err != nil {
		return fmt.Errorf("averaging: %w", err)
	}
	defer releaseAll(refs)
	first := refs[0].Tensor()
	var floats [][]float32
	var halves [][]uint16
	for i, r := range refs {
		t := r.Tensor()
		if t.DType != first.DType || !slices.Equal(t.Shape, first.Shape) {
			return fmt.Errorf("averaging: %w: %q is %v %v, %q is %v %v", ErrWrongType, keys[i], t.DType, t.Shape, keys[0], first.DType, first.Shape)
		}
		switch t.DType {
		case tensor.Float32:
			floats = append(floats, tensor.Floats(t.Data))
		case tensor.Float16:
			halves = append(halves, tensor.Halves(t.Data))
		default:
			return fmt.Errorf("averaging: %w: %q is %v, not float32 or float16", ErrWrongType, keys[i], t.DType)
		}
	}
	b, err := db.mem.alloc(4 * first.Len())
	if err != nil {
		return fmt.Errorf("averaging into %q: %w", dst, err)
	}
	switch {
	case halves != nil:
		kernel.HalfMean(b.floats(), halves, w)
	case w != nil:
		kernel.WeightedMean(b.floats(), floats, w)
	default:
		kernel.Mean(b.floats(), floats)
	}
	if i := kernel.FirstNonFinite(b.floats()); i >= 0 {
		b.release()
		return fmt.Errorf("averaging into %q: %w: the mean of %q has no finite value at index %d", dst, ErrNotFinite, keys, i)
	}
	_, err = db.put(dst, &version{blob: b, dtype: tensor.Float32, shape: first.Shape})
	return err
}

// checkWeights returns the weights as floats, nil where there are none.
func checkWeights(keys []string, weights []uint32) ([]float32, error) {
	if weights == nil {
		return nil, nil
	}
	if len(weights) != len(keys) {
		return nil, fmt.Errorf("%w: the mean of %d tensors with %d weights", ErrOutOfRange, len(keys), len(weights))
	}
	floats := make([]float32, len(weights))
	for i, w := range weights {
		if w < 1 || w > maxWeight {
			return nil, fmt.Errorf("%w: the weight %d of %q, 1 to %d are allowed", ErrOutOfRange, w, keys[i], maxWeight)
		}
		floats[i] = float32(w)
	}
	return floats, nil
}

// maxHalf is the largest half; what is nearer to it than to the next step
// becomes it.
const maxHalf = 65504

// Half stores the float32 tensor src under dst as float16, each number rounded
// to the nearest, ties to even. One beyond 65504 is ErrOutOfRange, and then
// nothing is stored.
func (db *DB) Half(dst, src string) error {
	if err := checkKey(dst); err != nil {
		return err
	}
	ref, err := db.Get(src)
	if err != nil {
		return err
	}
	defer ref.Release()
	t := ref.Tensor()
	if t.DType != tensor.Float32 {
		return fmt.Errorf("%w: %q is %v, not float32", ErrWrongType, src, t.DType)
	}
	floats := tensor.Floats(t.Data)
	b, err := db.mem.alloc(2 * len(floats))
	if err != nil {
		return fmt.Errorf("storing %q as float16: %w", src, err)
	}
	halves := tensor.Halves(b.data)
	kernel.EncodeHalf(halves, floats)
	if i := tensor.NonFiniteHalf(halves); i >= 0 {
		b.release()
		return fmt.Errorf("%w: %q has %v at index %d, float16 ends at %d", ErrOutOfRange, src, floats[i], i, maxHalf)
	}
	_, err = db.put(dst, &version{blob: b, dtype: tensor.Float16, shape: t.Shape})
	return err
}

// Update applies the gradient to the parameters as the given step of an
// optimizer. The state key remembers the step: asked again for the step that
// was applied last, Update changes nothing and returns false; any other than
// the one that follows is ErrOutOfRange. A state that does not exist is one of
// zeros at step 0. Parameters and state change at one moment.
func (db *DB) Update(params, state, grad string, step uint64, c optim.Config) (applied bool, err error) {
	if err := checkKey(state); err != nil {
		return false, err
	}
	if err := c.Validate(); err != nil {
		return false, fmt.Errorf("updating %q: %w: %w", params, ErrOutOfRange, err)
	}
	if params == state || params == grad || state == grad {
		return false, fmt.Errorf("%w: updating %q with state %q and gradient %q: the keys must differ", ErrOutOfRange, params, state, grad)
	}
	// The work is done without the lock. Whoever changed the parameters or
	// the state in the meantime wins, and the check is made again.
	for {
		applied, done, err := db.tryUpdate(params, state, grad, step, c)
		if err != nil {
			return false, fmt.Errorf("updating %q: %w", params, err)
		}
		if done {
			return applied, nil
		}
	}
}

func (db *DB) tryUpdate(params, state, grad string, step uint64, c optim.Config) (applied, done bool, err error) {
	db.mu.RLock()
	var old *Ref // nil: no state yet
	if db.tensors[state] != nil {
		old, err = db.getLocked(state)
	}
	db.mu.RUnlock()
	if err != nil {
		return false, false, err
	}
	current := uint64(0)
	if old != nil {
		defer old.Release()
		current = old.Step()
	}
	if step == current && step > 0 {
		return false, true, nil
	}
	if step != current+1 {
		return false, false, fmt.Errorf("%w: step %d, but %q is at step %d", ErrOutOfRange, step, state, current)
	}
	refs, err := db.getAll(params, grad)
	if err != nil {
		return false, false, err
	}
	defer releaseAll(refs)
	p, g := refs[0].Tensor(), refs[1].Tensor()
	n := p.Len()
	if p.DType != tensor.Float32 || g.DType != tensor.Float32 || g.Len() != n {
		return false, false, fmt.Errorf("%w: it is %v %v, the gradient is %v %v", ErrWrongType, p.DType, p.Shape, g.DType, g.Shape)
	}
	newParams, err := db.mem.alloc(len(p.Data))
	if err != nil {
		return false, false, err
	}
	newState, err := db.mem.alloc(4 * c.StateLen(n))
	if err != nil {
		newParams.release()
		return false, false, err
	}
	commit := false
	defer func() {
		if !commit {
			newParams.release()
			newState.release()
		}
	}()
	oldState := newState.floats()
	if old == nil {
		clear(newState.data)
	} else {
		t := old.Tensor()
		if t.DType != tensor.Float32 || t.Len() != c.StateLen(n) {
			return false, false, fmt.Errorf("%w: state %q is %v %v, %s of %d parameters has %d floats", ErrWrongType, state, t.DType, t.Shape, c.Name, n, c.StateLen(n))
		}
		oldState = tensor.Floats(t.Data)
	}
	c.Step(newParams.floats(), newState.floats(), tensor.Floats(p.Data), oldState, tensor.Floats(g.Data), step)

	db.mu.Lock()
	defer db.mu.Unlock()
	nowState := db.tensors[state]
	switch {
	case db.closed:
		return false, false, ErrClosed
	case db.tensors[params] != refs[0].v, (old == nil) != (nowState == nil), old != nil && nowState != old.v:
		return false, false, nil
	}
	commit = true
	db.putLocked(params, &version{blob: newParams, dtype: tensor.Float32, shape: p.Shape})
	db.putLocked(state, &version{blob: newState, dtype: tensor.Float32, shape: []int{c.StateLen(n)}, step: step})
	return true, true, nil
}

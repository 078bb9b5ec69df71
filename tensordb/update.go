package tensordb

import (
	"fmt"
	"slices"

	"github.com/spirt-ml/spirt/internal/kernel"
	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/tensor"
)

// Mean stores the mean of float32 tensors of one shape under dst. They are
// added in the order of keys, then divided by their number.
func (db *DB) Mean(dst string, keys []string) error {
	if err := checkKey(dst); err != nil {
		return err
	}
	if len(keys) == 0 {
		return fmt.Errorf("%w: the mean of no tensors", ErrOutOfRange)
	}
	refs, err := db.getAll(keys...)
	if err != nil {
		return fmt.Errorf("averaging: %w", err)
	}
	defer releaseAll(refs)
	first := refs[0].Tensor()
	sources := make([][]float32, len(refs))
	for i, r := range refs {
		t := r.Tensor()
		if t.DType != tensor.Float32 || !slices.Equal(t.Shape, first.Shape) {
			return fmt.Errorf("averaging: %w: %q is %v %v, %q is %v %v", ErrWrongType, keys[i], t.DType, t.Shape, keys[0], first.DType, first.Shape)
		}
		sources[i] = tensor.Floats(t.Data)
	}
	b, err := db.mem.alloc(len(first.Data))
	if err != nil {
		return fmt.Errorf("averaging into %q: %w", dst, err)
	}
	kernel.Mean(b.floats(), sources)
	if i := kernel.FirstNonFinite(b.floats()); i >= 0 {
		b.release()
		return fmt.Errorf("averaging into %q: %w: the mean of %q has no finite value at index %d", dst, ErrNotFinite, keys, i)
	}
	_, err = db.put(dst, &version{blob: b, dtype: tensor.Float32, shape: first.Shape})
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

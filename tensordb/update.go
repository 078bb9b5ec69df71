package tensordb

import (
	"fmt"

	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/tensor"
)

// UpdateKeys names the tensors of an update.
type UpdateKeys struct {
	Params, State, Gradient string
	// IntoParams and IntoState are where the results go. Empty: they become
	// the new Params and State.
	IntoParams, IntoState string
}

// Update applies the gradient to the parameters as the given step of an
// optimizer. The state key remembers the step: asked again for the step that
// was applied last, Update changes nothing and returns false; any other than
// the one that follows is ErrOutOfRange. A state that does not exist is one of
// zeros at step 0. Parameters and state change at one moment.
//
// With IntoParams and IntoState what was before stays, and it is their state
// that remembers: where it is at this step already, nothing happens.
func (db *DB) Update(k UpdateKeys, step uint64, c optim.Config) (applied bool, err error) {
	return db.update(k, step, c, nil, 0)
}

// update takes the gradient from memory if it is not nil: it was computed at
// the parameters of this version, and where they are others by now it is
// errReplaced.
func (db *DB) update(k UpdateKeys, step uint64, c optim.Config, gradient []float32, version uint64) (applied bool, err error) {
	apart := k.IntoParams != "" || k.IntoState != ""
	if !apart {
		k.IntoParams, k.IntoState = k.Params, k.State
	}
	for _, key := range []string{k.IntoParams, k.IntoState} {
		if err := checkKey(key); err != nil {
			return false, err
		}
	}
	if err := c.Validate(); err != nil {
		return false, fmt.Errorf("updating %q: %w: %w", k.Params, ErrOutOfRange, err)
	}
	if k.Params == k.State || k.Gradient == k.Params || k.Gradient == k.State || k.IntoParams == k.IntoState ||
		apart && (k.IntoParams == k.Params || k.IntoParams == k.State || k.IntoState == k.State || k.IntoState == k.Params || k.IntoParams == k.Gradient || k.IntoState == k.Gradient) {
		return false, fmt.Errorf("%w: updating %q with state %q and gradient %q: the keys must differ", ErrOutOfRange, k.Params, k.State, k.Gradient)
	}
	if gradient != nil {
		k.Gradient = k.Params // read anyway
	}
	t := &Task{Reads: []string{k.Params, k.Gradient, k.State}, Optional: 1, Guarded: true}
	if apart {
		t.Reads, t.Optional = append(t.Reads, k.IntoState), 2
	}
	n := 0
	t.Plan = func(reads []*Meta) (Plan, error) {
		applied = false
		p, g, state := reads[0], reads[1], reads[2]
		current := uint64(0)
		if state != nil {
			current = state.Step
		}
		if apart && step > 0 && reads[3] != nil && reads[3].Step == step && current == step-1 || !apart && step > 0 && step == current {
			return Plan{Nothing: true}, nil
		}
		if step != current+1 {
			return Plan{}, fmt.Errorf("updating %q: %w: step %d, but %q is at step %d", k.Params, ErrOutOfRange, step, k.State, current)
		}
		if gradient != nil && p.Version != version {
			return Plan{}, errReplaced
		}
		n = p.Len()
		if p.DType != tensor.Float32 || g.DType != tensor.Float32 || g.Len() != n {
			return Plan{}, fmt.Errorf("updating %q: %w: it is %v %v, the gradient is %v %v", k.Params, ErrWrongType, p.DType, p.Shape, g.DType, g.Shape)
		}
		length := c.StateLen(n)
		if state != nil && (state.DType != tensor.Float32 || state.Len() != length) {
			return Plan{}, fmt.Errorf("updating %q: %w: state %q is %v %v, %s of %d parameters has %d floats", k.Params, ErrWrongType, k.State, state.DType, state.Shape, c.Name, n, length)
		}
		applied = true
		return Plan{
			Writes: []Output{
				{k.IntoParams, Meta{DType: tensor.Float32, Shape: p.Shape}},
				{k.IntoState, Meta{DType: tensor.Float32, Shape: []int{length}, Step: step}},
			},
			Span: n, Weight: 4 * (3 + 2*length/max(n, 1)),
		}, nil
	}
	t.Compute = func(dst, src [][]byte, lo, hi int) {
		from := floats(dst[1])
		if src[2] != nil {
			from = floats(src[2])
		} else {
			for at := 0; at < len(from); at += n { // each of the state's vectors
				clear(from[at+lo : at+hi])
			}
		}
		g := gradient
		if g == nil {
			g = floats(src[1])
		}
		c.StepRange(floats(dst[0]), floats(dst[1]), floats(src[0]), from, g, lo, hi, step)
	}
	if err := db.space.Run(t); err != nil {
		return false, err
	}
	return applied, nil
}

package spirt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/spirt-ml/spirt/dataset"
	"github.com/spirt-ml/spirt/function"
	"github.com/spirt-ml/spirt/function/gradient"
	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/internal/treehash"
)

// computer computes a peer's averaged gradients with its functions. What the
// functions read and write lies in the peer's database; only keys travel.
type computer struct {
	job      Job
	store    *store
	platform *function.Platform
	base     gradient.Event // what all events have in common
	order    dataset.Order  // of the minibatches
	stride   uint64         // of this peer in that order
	offset   uint64
	samples  int           // for validation
	serial   atomic.Uint64 // of accumulators: none is used twice
	warn     func(format string, args ...any)
}

// averaged is this peer's contribution to a slot.
type averaged struct {
	hash treehash.Hash
	loss *float64 // mean over the minibatches whose functions told it; nil if none did
	// release lets the average be dropped unless it is retained by then.
	release func()
}

// average computes this peer's minibatches of a round (1, 2, ...) at the
// parameters that follow a record, and their average. A minibatch whose
// function failed for good is left out and told; an error means that none is
// left.
func (c *computer) average(ctx context.Context, height uint64, parent round.Record) (averaged, error) {
	n := c.job.BatchesPerRound
	window := c.job.Functions.Concurrency
	event, err := c.event(parent)
	if err != nil {
		return averaged{}, err
	}
	acc := c.store.key("gradient/" + strconv.FormatUint(c.serial.Add(1), 10))
	if err := c.store.db.Accumulator(acc, c.store.params, n, window); err != nil {
		return averaged{}, err
	}
	event.Task, event.Accumulate = "gradient", acc
	event.Images, event.Labels = c.store.key("train/images"), c.store.key("train/labels")

	var (
		mu     sync.Mutex
		ended  = sync.NewCond(&mu)
		done   = make([]bool, n)
		next   int // minibatches below it have ended
		sum    float64
		told   int // losses in sum
		failed error
		wg     sync.WaitGroup
	)
	for i := 0; i < n && ctx.Err() == nil; i++ {
		mu.Lock()
		for i >= next+window { // what arrives early is buffered: bound it
			ended.Wait()
		}
		mu.Unlock()
		e := event
		e.Minibatch = i
		e.Rows = c.order.Minibatch(((height-1)*uint64(n)+uint64(i))*c.stride+c.offset, c.job.BatchSize)
		wg.Add(1)
		go func() {
			defer wg.Done()
			r, err := c.invoke(ctx, e)
			if err != nil && ctx.Err() == nil {
				c.warn("round %d, minibatch %d is left out: %v", height, i, err)
				err = errors.Join(err, c.store.db.Skip(acc, i))
			}
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil:
				failed = err
			case !plausible(r.Loss): // it cannot be shown; the database judges the gradient
				c.warn("round %d, minibatch %d: the function told a loss of %v, which is not between 0 and %v", height, i, r.Loss, float64(maxLoss))
			default:
				sum += r.Loss
				told++
			}
			for done[i] = true; next < n && done[next]; next++ {
			}
			ended.Broadcast()
		}()
	}
	wg.Wait()
	if err := ctx.Err(); err != nil {
		c.store.db.Delete(acc)
		return averaged{}, err
	}
	h, _, err := c.store.finishAverage(acc)
	if err != nil {
		if failed != nil {
			err = failed // the cause
		}
		return averaged{}, err
	}
	avg := averaged{hash: h, release: func() { c.store.unpin(h) }}
	if told > 0 {
		mean := sum / float64(told)
		avg.loss = &mean
	}
	return avg, nil
}

// maxLoss bounds a loss: that of a validation travels in millionths as an
// integer, and sums of others stay numbers that JSON has.
const maxLoss = 1e12

func plausible(loss float64) bool { return loss >= 0 && loss < maxLoss }

// validate evaluates the parameters that follow a record on the validation
// samples.
func (c *computer) validate(ctx context.Context, parent round.Record) (round.Validation, error) {
	event, err := c.event(parent)
	if err != nil {
		return round.Validation{}, err
	}
	event.Task = "evaluate"
	event.Images, event.Labels = c.store.key("validation/images"), c.store.key("validation/labels")
	event.Rows = make([]int, c.samples)
	for i := range event.Rows {
		event.Rows[i] = i
	}
	r, err := c.invoke(ctx, event)
	if err != nil {
		return round.Validation{}, fmt.Errorf("validating: %w", err)
	}
	v, err := validation(r, c.samples)
	if err != nil {
		return round.Validation{}, fmt.Errorf("validating: %w", err)
	}
	return v, nil
}

// validation checks what a function says about so many samples: others would
// refuse a message with what cannot be.
func validation(r gradient.Result, samples int) (round.Validation, error) {
	if !plausible(r.Loss) {
		return round.Validation{}, fmt.Errorf("the loss %v is not between 0 and %v", r.Loss, float64(maxLoss))
	}
	if r.Samples != samples || r.Correct < 0 || r.Correct > samples {
		return round.Validation{}, fmt.Errorf("the function says %d right of %d samples, but there are %d", r.Correct, r.Samples, samples)
	}
	return round.Validation{LossMicro: int64(r.Loss * 1e6), Correct: uint32(r.Correct), Count: uint32(r.Samples)}, nil
}

// event returns the common event with the parameters that follow a record.
func (c *computer) event(parent round.Record) (gradient.Event, error) {
	e := c.base
	key, _ := c.store.stateKeys(parent)
	ref, err := c.store.db.Get(key)
	if err != nil {
		return e, fmt.Errorf("the parameters after round %d: %w", parent.Height, err)
	}
	e.Parameters.Key, e.Parameters.Version = key, ref.Version()
	ref.Release()
	return e, nil
}

func (c *computer) invoke(ctx context.Context, e gradient.Event) (gradient.Result, error) {
	payload, err := json.Marshal(e)
	if err != nil {
		return gradient.Result{}, fmt.Errorf("encoding an event: %w", err)
	}
	var r gradient.Result
	out, _, err := c.platform.Invoke(ctx, payload)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(out, &r); err != nil {
		return r, fmt.Errorf("the function's result %.80q: %w", strings.TrimSpace(string(out)), err)
	}
	return r, nil
}

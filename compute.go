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
	"time"

	"github.com/spirt-ml/spirt/dataset"
	"github.com/spirt-ml/spirt/function"
	"github.com/spirt-ml/spirt/function/gradient"
	"github.com/spirt-ml/spirt/internal/round"
	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/nn"
	"github.com/spirt-ml/spirt/tensor"
	"github.com/spirt-ml/spirt/tensordb"
)

// computer computes a peer's averaged gradients with its functions. What the
// functions read and write lies in the peer's database; only keys travel.
type computer struct {
	job      Job
	self     int // this peer's index
	store    *store
	platform *function.Platform // nil where the database computes
	trainer  trainer            // that database; else nil
	slots    chan struct{}      // of what it computes at once
	base     gradient.Event     // what all events have in common
	sign     func(tensordb.Grant) (string, error)
	train    int           // samples to train on: the job's, or this peer's own
	private  bool          // they are this peer's own
	samples  int           // for validation
	serial   atomic.Uint64 // of accumulators: none is used twice
	warn     func(format string, args ...any)
	exchange *exchange // with functions, where the database has no tensor commands; else nil
}

// trainer is a database that computes gradients itself.
type trainer interface {
	SetModel(key string, spec nn.Spec) (params int, err error)
	Gradient(s tensordb.Samples, accumulate string, minibatch int) (nn.Score, tensordb.Status, error)
	Evaluate(s tensordb.Samples) (nn.Score, error)
}

// trainIn has a database compute in place of functions.
func (c *computer) trainIn(db trainer) error {
	c.trainer, c.slots = db, make(chan struct{}, c.job.Functions.Concurrency)
	_, err := db.SetModel(c.store.key("model"), c.base.Model)
	return err
}

// inDatabase does what a function would.
func (c *computer) inDatabase(ctx context.Context, e gradient.Event) (r gradient.Result, err error) {
	select {
	case c.slots <- struct{}{}:
	case <-ctx.Done():
		return r, ctx.Err()
	}
	defer func() { <-c.slots }()
	s := tensordb.Samples{Model: c.store.key("model"), Params: e.Parameters.Key, Images: e.Images, Labels: e.Labels, Scale: e.Scale, Offset: e.Offset, Rows: e.Rows}
	var score nn.Score
	if e.Task == gradient.TaskGradient {
		var status tensordb.Status
		score, status, err = c.trainer.Gradient(s, e.Accumulate, e.Minibatch)
		r.Status = status.String()
	} else {
		s.Rows = nil // all
		score, err = c.trainer.Evaluate(s)
	}
	r.Loss, r.Correct, r.Samples = score.Loss, score.Correct, score.Samples
	return r, err
}

// openOwn opens the data set that a peer brings for its training minibatches.
// Validation stays the job's, and so does what normalises the pixels.
func (j *Job) openOwn(name string, spec nn.Spec) (*dataset.Dataset, error) {
	if name == j.Data {
		return nil, fmt.Errorf("the peer's own data: %q is the job's, with the samples that it validates on: leave it to the roster to deal it out", name)
	}
	d, err := dataset.Open(name)
	if err != nil {
		return nil, fmt.Errorf("the peer's own data: %w", err)
	}
	if err := d.Fits(spec.Input, spec.Classes); err != nil {
		return nil, fmt.Errorf("the peer's own data: the model %s: %w", spec.Name, err)
	}
	if d.Len() < j.BatchSize {
		return nil, fmt.Errorf("the peer's own data: %q has %d samples, fewer than one minibatch of %d: add some", name, d.Len(), j.BatchSize)
	}
	return d, nil
}

// loadSamples puts the samples that this peer computes on, which may be its
// own, and those for validation in its database.
func (c *computer) loadSamples(data, own *dataset.Dataset) error {
	train, validation, _ := data.Split()
	from := data
	if own != nil {
		from, train, c.private = own, own.All(), true
	}
	c.train, c.samples = train.Len(), validation.Len()
	return errors.Join(c.load("train", from, train), c.load("validation", data, validation))
}

func (c *computer) load(name string, data *dataset.Dataset, rows dataset.Range) error {
	images, labels := data.Rows(rows)
	shape := append([]int{rows.Len()}, data.Shape...)
	if _, err := c.store.db.Set(c.store.key(name+"/images"), tensor.Tensor{DType: tensor.Uint8, Shape: shape, Data: images}); err != nil {
		return fmt.Errorf("storing the %s images: %w", name, err)
	}
	if _, err := c.store.db.Set(c.store.key(name+"/labels"), tensor.Tensor{DType: tensor.Uint8, Shape: []int{rows.Len()}, Data: labels}); err != nil {
		return fmt.Errorf("storing the %s labels: %w", name, err)
	}
	return nil
}

// deal returns how many minibatches this peer computes at the parameters that
// follow a record, under the shares in force there, and the rows of each.
func (c *computer) deal(parent round.Record, members shares) (minibatches int, rows func(i int) []int, err error) {
	own, before, err := members.of(c.self)
	switch {
	case err != nil:
		return 0, nil, err
	case own.private && !c.private:
		return 0, nil, errors.New("the roster says that this peer trains on data of its own: name its folder with --data")
	case c.private && !own.private:
		return 0, nil, errors.New("this peer was started with data of its own, but the roster deals it samples of the job: start it without --data, or have an admin sign a roster that says so")
	}
	order, first, lo := dataset.Order{Seed: c.job.Seed, Len: c.train}, parent.Position+before, 0
	if own.private || c.job.Shards == shardsFixed { // an order of its own over its own samples
		hi := c.train
		if !own.private {
			if lo, hi, err = members.part(c.train, c.self); err != nil {
				return 0, nil, err
			}
			if lo == hi {
				return 0, nil, fmt.Errorf("%d samples are too few for a part of this peer's own: take shards epoch", c.train)
			}
		}
		order.Peer, order.Len = c.self, hi-lo
		first = parent.Height * uint64(own.minibatches)
	}
	return own.minibatches, func(i int) []int {
		rows := order.Minibatch(first+uint64(i), c.job.BatchSize)
		for j := range rows {
			rows[j] += lo
		}
		return rows
	}, nil
}

// averaged is this peer's contribution to a slot.
type averaged struct {
	hash    treehash.Hash
	loss    *float64 // mean over the minibatches whose functions told it; nil if none did
	samples int      // in the minibatches that are in it
	// release lets the average be dropped unless it is retained by then.
	release func()
}

// average computes this peer's minibatches of a round (1, 2, ...) at the
// parameters that follow a record, under the shares in force there, and their
// average. A minibatch whose function failed for good is left out and told; an
// error means that none is left.
func (c *computer) average(ctx context.Context, height uint64, parent round.Record, members shares) (averaged, error) {
	n, rows, err := c.deal(parent, members)
	if err != nil {
		return averaged{}, err
	}
	window := c.job.Functions.Concurrency
	parameters, _ := c.store.stateKeys(parent)
	event, err := c.event(parameters)
	if err != nil {
		return averaged{}, fmt.Errorf("the parameters after round %d: %w", parent.Height, err)
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
		e.Rows = rows(i)
		wg.Add(1)
		go func() {
			defer wg.Done()
			r, err := c.invoke(function.Label(ctx, invoked{e.Task, height, i}), e)
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
	h, counted, err := c.store.finishAverage(acc)
	if err != nil {
		if failed != nil {
			err = failed // the cause
		}
		return averaged{}, err
	}
	avg := averaged{hash: h, samples: counted * c.job.BatchSize, release: func() { c.store.unpin(h) }}
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

// keepForValidation keeps the parameters that follow a record until validate
// has evaluated them, while the rounds go on.
func (c *computer) keepForValidation(r round.Record) error {
	key, _ := c.store.stateKeys(r)
	if err := c.store.db.Copy(c.validationKey(r), key); err != nil {
		return fmt.Errorf("the parameters after round %d: %w", r.Height, err)
	}
	return nil
}

func (c *computer) validationKey(r round.Record) string {
	return c.store.key("validation/" + r.ID().String())
}

// validate evaluates the parameters that were kept on the validation samples.
func (c *computer) validate(ctx context.Context, r round.Record) (round.Validation, error) {
	defer c.store.db.Delete(c.validationKey(r))
	event, err := c.event(c.validationKey(r))
	if err != nil {
		return round.Validation{}, err
	}
	event.Task = "evaluate"
	event.Images, event.Labels = c.store.key("validation/images"), c.store.key("validation/labels")
	event.Rows = make([]int, c.samples)
	for i := range event.Rows {
		event.Rows[i] = i
	}
	result, err := c.invoke(function.Label(ctx, invoked{task: event.Task, round: r.Height}), event)
	if err != nil {
		return round.Validation{}, fmt.Errorf("validating: %w", err)
	}
	v, err := validated(result, c.samples)
	if err != nil {
		return round.Validation{}, fmt.Errorf("validating: %w", err)
	}
	return v, nil
}

// validated checks what a function says about so many samples: others would
// refuse a message with what cannot be.
func validated(r gradient.Result, samples int) (round.Validation, error) {
	if !plausible(r.Loss) {
		return round.Validation{}, fmt.Errorf("the loss %v is not between 0 and %v", r.Loss, float64(maxLoss))
	}
	if r.Samples != samples || r.Correct < 0 || r.Correct > samples {
		return round.Validation{}, fmt.Errorf("the function says %d right of %d samples, but there are %d", r.Correct, r.Samples, samples)
	}
	return round.Validation{LossMicro: int64(r.Loss * 1e6), Correct: uint32(r.Correct), Count: uint32(r.Samples)}, nil
}

// event returns the common event with these parameters.
func (c *computer) event(parameters string) (gradient.Event, error) {
	e := c.base
	m, err := c.store.db.Stat(parameters)
	if err != nil {
		return e, err
	}
	e.Parameters.Key, e.Parameters.Version = parameters, m.Version
	return e, nil
}

// invoke runs a function with a token for what its event names, no more.
func (c *computer) invoke(ctx context.Context, e gradient.Event) (gradient.Result, error) {
	if c.trainer != nil {
		return c.inDatabase(ctx, e)
	}
	if c.exchange != nil {
		for _, key := range []string{e.Parameters.Key, e.Images, e.Labels} {
			if err := c.exchange.publish(key); err != nil {
				return gradient.Result{}, err
			}
		}
	}
	grant := tensordb.Grant{
		Read: []string{e.Parameters.Key, e.Images, e.Labels}, Accumulate: e.Accumulate, Minibatch: e.Minibatch, Life: 4*c.job.Functions.Timeout + time.Hour, // retries too, and waiting
	}
	var err error
	if e.Database.Token, err = c.sign(grant); err != nil {
		return gradient.Result{}, err
	}
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
	if c.exchange != nil && e.Accumulate != "" {
		return r, c.exchange.collect(e.Accumulate, e.Minibatch)
	}
	return r, nil
}

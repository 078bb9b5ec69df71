package tensordb

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"sync"

	"github.com/spirt-ml/spirt/internal/kernel"
	"github.com/spirt-ml/spirt/nn"
	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/tensor"
)

// This file trains and evaluates where the tensors lie, with the native engine:
// for peers that have no functions.

// Samples names what a gradient or an evaluation is computed of.
type Samples struct {
	Model, Params  string // keys: of SetModel, and float32 parameters
	Images, Labels string // keys: uint8, one sample a row; labels one byte each
	Scale, Offset  float32
	Rows           []int // of images and labels; none, for Evaluate: all
}

// Bounds of training.
const (
	maxTrainRows    = 4096
	maxEvaluateRows = 500_000
	maxModel        = 1 << 20 // bytes of a definition
	maxModels       = 4       // that are kept ready
	maxReady        = 2       // minibatches of each that are kept ready
	maxMinibatch    = 4 << 30 // bytes of one, also where the database has no limit
)

// engine keeps models ready, and memory to compute with.
type engine struct {
	mu     sync.Mutex
	models map[string]*readyModel // by definition
	clock  int64
}

type readyModel struct {
	model *nn.Model
	ready []*nn.Minibatch
	used  int64
}

// SetModel stores a model's definition under key and returns the number of its
// parameters.
func (db *DB) SetModel(key string, spec nn.Spec) (params int, err error) {
	model, err := nn.New(spec)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrWrongType, err)
	}
	text, err := json.Marshal(model.Spec())
	if err != nil || len(text) > maxModel {
		return 0, fmt.Errorf("%w: a definition of %d bytes, at most %d are allowed", ErrWrongType, len(text), maxModel)
	}
	_, err = db.Set(key, tensor.Tensor{DType: tensor.Uint8, Shape: []int{len(text)}, Data: text})
	return model.NumParams(), err
}

// readModel reads a definition: the name of a built-in model, or JSON.
func readModel(text []byte) (nn.Spec, error) {
	var spec nn.Spec
	if spec, err := nn.Builtin(string(text)); err == nil {
		return spec, nil
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	err := d.Decode(&spec)
	if err == nil {
		if _, err = d.Token(); errors.Is(err, io.EOF) {
			return spec, nil
		}
		err = errors.New("there is text after its end")
	}
	return spec, fmt.Errorf("%w: the definition is neither the name of a built-in model nor the JSON of one: %w", ErrWrongType, err)
}

// InitModel stores initial parameters of a model under dst.
func (db *DB) InitModel(dst, model string, seed uint64) error {
	if err := checkKey(dst); err != nil {
		return err
	}
	m, _, err := db.borrow(model, 0)
	if err != nil {
		return err
	}
	b, err := db.space.Alloc(4 * m.NumParams())
	if err != nil {
		return err
	}
	params, err := db.mem.alloc(4 * m.NumParams()) // at an address that suits
	if err != nil {
		b.Release()
		return err
	}
	defer params.release()
	m.Init(params.floats(), seed)
	copy(b.Data(), params.data)
	_, err = db.space.Put(dst, Meta{DType: tensor.Float32, Shape: []int{m.NumParams()}}, b)
	return err
}

// borrow returns the model under key, and a minibatch with room for n samples,
// or none for n = 0. Give it back.
func (db *DB) borrow(key string, n int) (*nn.Model, *nn.Minibatch, error) {
	ref, err := db.Get(key)
	if err != nil {
		return nil, nil, err
	}
	t := ref.Tensor()
	if t.DType != tensor.Uint8 || len(t.Data) > maxModel {
		ref.Release()
		return nil, nil, fmt.Errorf("%w: %q is %v %v, not the definition of a model", ErrWrongType, key, t.DType, t.Shape)
	}
	text := string(t.Data)
	ref.Release()
	e := &db.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	e.clock++
	r := e.models[text]
	if r == nil {
		spec, err := readModel([]byte(text))
		if err != nil {
			return nil, nil, fmt.Errorf("%q: %w", key, err)
		}
		model, err := nn.New(spec)
		if err != nil {
			return nil, nil, fmt.Errorf("%q: %w: %w", key, ErrWrongType, err)
		}
		if e.models == nil {
			e.models = make(map[string]*readyModel)
		}
		if len(e.models) >= maxModels {
			e.dropOldest(&db.mem)
		}
		r = &readyModel{model: model}
		e.models[text] = r
	}
	r.used = e.clock
	if n == 0 {
		return r.model, nil, nil
	}
	if size := sizeOf(r.model, n); size > maxMinibatch {
		return nil, nil, fmt.Errorf("%w: a minibatch of %d samples of model %q takes %d bytes, at most %d are allowed: take fewer rows", ErrOutOfRange, n, key, size, int64(maxMinibatch))
	}
	b := r.model.NewMinibatch()
	if len(r.ready) > 0 {
		b = r.ready[len(r.ready)-1]
		r.ready = r.ready[:len(r.ready)-1]
	}
	if had := b.Room(); had < n {
		db.mem.unreserve(sizeOf(r.model, had))
		if err := db.mem.reserve(sizeOf(r.model, n)); err != nil {
			return nil, nil, fmt.Errorf("a minibatch of %d samples of model %q: %w", n, key, err)
		}
		b.Grow(n)
	}
	return r.model, b, nil
}

func sizeOf(m *nn.Model, samples int) int64 {
	if samples == 0 {
		return 0
	}
	return m.MinibatchSize(samples)
}

// dropOldest drops the model that was used longest ago. e.mu is held.
func (e *engine) dropOldest(mem *memory) {
	oldest := ""
	for text, r := range e.models {
		if oldest == "" || r.used < e.models[oldest].used {
			oldest = text
		}
	}
	r := e.models[oldest]
	for _, b := range r.ready {
		mem.unreserve(sizeOf(r.model, b.Room()))
	}
	delete(e.models, oldest)
}

// giveBack keeps a minibatch for the next.
func (db *DB) giveBack(m *nn.Model, b *nn.Minibatch) {
	e := &db.engine
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, r := range e.models {
		if r.model == m && len(r.ready) < maxReady {
			r.ready = append(r.ready, b)
			return
		}
	}
	db.mem.unreserve(sizeOf(m, b.Room()))
}

// parameters returns the parameters, which fit the model. Release them.
func (db *DB) parameters(key string, m *nn.Model) (*Ref, error) {
	ref, err := db.Get(key)
	if err != nil {
		return nil, err
	}
	if t := ref.Tensor(); t.DType != tensor.Float32 || t.Len() != m.NumParams() {
		ref.Release()
		return nil, fmt.Errorf("%w: parameters %q are %v %v, the model has %d float32", ErrWrongType, key, t.DType, t.Shape, m.NumParams())
	}
	return ref, nil
}

// load has samples of a model in b.
func (db *DB) load(s Samples, rows []int, m *nn.Model, b *nn.Minibatch) error {
	images, err := db.bytesOf(s.Images, rows, m.InputLen())
	if err != nil {
		return err
	}
	labels, err := db.bytesOf(s.Labels, rows, 1)
	if err != nil {
		return err
	}
	if err := b.Load(images, labels, rows); err != nil {
		return fmt.Errorf("%w: images %q and labels %q: %w", ErrWrongType, s.Images, s.Labels, err)
	}
	return nil
}

// bytesOf returns rows of a uint8 tensor that have so many bytes each: no
// memory is taken for others, which may be of any size.
func (db *DB) bytesOf(key string, rows []int, want int) ([]byte, error) {
	return db.rows(nil, key, rows, func(m *Meta, size int) error {
		if m.DType != tensor.Uint8 || size != want {
			return fmt.Errorf("%w: %q is %v %v, want uint8 with %d bytes a row", ErrWrongType, key, m.DType, m.Shape, want)
		}
		return nil
	})
}

func (s *Samples) check(limit int) error {
	scale, offset := float64(s.Scale), float64(s.Offset)
	if scale == 0 || math.IsNaN(scale) || math.IsInf(scale, 0) || math.IsNaN(offset) || math.IsInf(offset, 0) {
		return fmt.Errorf("%w: scale %v and offset %v: want numbers, scale not 0", ErrOutOfRange, s.Scale, s.Offset)
	}
	if len(s.Rows) < 1 || len(s.Rows) > limit {
		return fmt.Errorf("%w: %d rows, want 1 to %d", ErrOutOfRange, len(s.Rows), limit)
	}
	return nil
}

// compute returns the gradient of a minibatch at the parameters in ref.
// Release it.
func (db *DB) compute(s Samples, m *nn.Model, b *nn.Minibatch, ref *Ref) (*blob, nn.Score, error) {
	b.Normalise(s.Scale, s.Offset)
	if err := db.load(s, s.Rows, m, b); err != nil {
		return nil, nn.Score{}, err
	}
	g, err := db.mem.alloc(4 * m.NumParams())
	if err != nil {
		return nil, nn.Score{}, err
	}
	score, err := b.Gradient(g.floats(), floats(ref.data))
	if err == nil {
		if i := kernel.FirstNonFinite(g.floats()); i >= 0 {
			err = fmt.Errorf("the gradient has %v at index %d", g.floats()[i], i)
		}
	}
	if err != nil {
		g.release()
		return nil, score, fmt.Errorf("%w: %w", ErrNotFinite, err)
	}
	return g, score, nil
}

// Gradient computes the gradient of a minibatch and adds it to a running sum,
// as Accumulate does. What has arrived before is not computed again.
func (db *DB) Gradient(s Samples, accumulate string, minibatch int) (score nn.Score, status Status, err error) {
	if err := s.check(maxTrainRows); err != nil {
		return score, 0, err
	}
	a, err := db.accumulator(accumulate)
	if err != nil {
		return score, 0, err
	}
	m, b, err := db.borrow(s.Model, len(s.Rows))
	if err != nil {
		return score, 0, err
	}
	defer db.giveBack(m, b)
	if duplicate, err := a.check(minibatch, 4*m.NumParams()); err != nil {
		return score, 0, err
	} else if duplicate {
		return score, Duplicate, nil
	}
	ref, err := db.parameters(s.Params, m)
	if err != nil {
		return score, 0, err
	}
	defer ref.Release()
	g, score, err := db.compute(s, m, b, ref)
	if err != nil {
		return score, 0, fmt.Errorf("minibatch %d: %w", minibatch, err)
	}
	status, err = a.put(&db.mem, minibatch, g)
	return score, status, err
}

// Evaluate computes the mean loss, and how many samples are classified right.
func (db *DB) Evaluate(s Samples) (score nn.Score, err error) {
	if len(s.Rows) == 0 {
		m, err := db.Stat(s.Labels)
		if err != nil {
			return score, err
		}
		if len(m.Shape) == 0 || m.Shape[0] > maxEvaluateRows {
			return score, fmt.Errorf("%w: labels %q are %v, want 1 to %d rows", ErrWrongType, s.Labels, m.Shape, maxEvaluateRows)
		}
		s.Rows = make([]int, m.Shape[0])
		for i := range s.Rows {
			s.Rows[i] = i
		}
	}
	if err := s.check(maxEvaluateRows); err != nil {
		return score, err
	}
	m, b, err := db.borrow(s.Model, nn.Chunk)
	if err != nil {
		return score, err
	}
	defer db.giveBack(m, b)
	ref, err := db.parameters(s.Params, m)
	if err != nil {
		return score, err
	}
	defer ref.Release()
	b.Normalise(s.Scale, s.Offset)
	score, err = b.Evaluate(floats(ref.data), s.Rows, func(rows []int) error { return db.load(s, rows, m, b) })
	if errors.Is(err, nn.ErrNotFinite) {
		err = fmt.Errorf("%w: %w", ErrNotFinite, err)
	}
	return score, err
}

// Train takes a whole step of an optimizer on one minibatch: s.Params and state
// change at one moment. It is idempotent by step as Update is.
func (db *DB) Train(s Samples, state string, step uint64, c optim.Config) (score nn.Score, applied bool, err error) {
	if err := s.check(maxTrainRows); err != nil {
		return score, false, err
	}
	m, b, err := db.borrow(s.Model, len(s.Rows))
	if err != nil {
		return score, false, err
	}
	defer db.giveBack(m, b)
	for {
		if meta, err := db.Stat(state); err == nil && meta.Step == step && step > 0 {
			return score, false, nil
		}
		ref, err := db.parameters(s.Params, m)
		if err != nil {
			return score, false, err
		}
		g, score, err := db.compute(s, m, b, ref)
		version := ref.Version()
		ref.Release()
		if err != nil {
			return score, false, err
		}
		applied, err := db.update(UpdateKeys{Params: s.Params, State: state}, step, c, g.floats(), version)
		g.release()
		if !errors.Is(err, errReplaced) { // else somebody has set the parameters meanwhile
			return score, applied, err
		}
	}
}

// errReplaced: the parameters are not those that a gradient was computed at.
var errReplaced = errors.New("the parameters were replaced")

func trainCommands() []*Command {
	return []*Command{
		{
			Name: "TENSOR.MODEL", Args: "key definition", Group: groupTrain, Complexity: "O(1)",
			Summary: "Stores the definition of a model: the name of a built-in one (lenet5, cnn, mlp, logistic), or JSON as in package nn.",
			Reply:   "the number of its parameters",
			Min:     3, Max: 3, Access: All, Payload: true, FirstKey: 1, LastKey: 1, run: runModel,
		}, {
			Name: "TENSOR.INIT", Args: "destination model seed", Group: groupTrain, Complexity: "O(n)",
			Summary: "Stores initial parameters of a model, a float32 vector.",
			Reply:   "OK",
			Min:     4, Max: 4, Access: All, FirstKey: 1, LastKey: 2, run: runInit,
		}, {
			Name: "TENSOR.GRADIENT", Args: "accumulator model parameters images labels minibatch scale offset row [row ...]", Group: groupTrain, Complexity: "O(the model's work)",
			Summary: "Computes loss and gradient of a minibatch, up to 4,096 rows of images and labels, and adds the gradient to a sum as TENSOR.ACCUMULATE does. A pixel is byte * scale + offset.",
			Reply:   "array: loss, right answers, samples, and as TENSOR.ACCUMULATE; of a duplicate nothing is computed",
			Min:     10, Access: All, FirstKey: 1, LastKey: 5, run: runGradient,
		}, {
			Name: "TENSOR.EVALUATE", Args: "model parameters images labels scale offset [row ...]", Group: groupTrain, Complexity: "O(the model's work)",
			Summary: "Computes the mean loss and the number of right answers, of all rows where none are named.",
			Reply:   "array: loss, right answers, samples",
			Min:     7, FirstKey: 1, LastKey: 4, run: runEvaluate,
		}, {
			Name: "TENSOR.TRAIN", Args: "parameters state model images labels scale offset rows row [row ...] STEP n optimizer LR x [option value ...]", Group: groupTrain, Complexity: "O(the model's work)",
			Summary: "Takes a whole step on one minibatch, of as many `rows` as are named: gradient and update. It is done once, as TENSOR.UPDATE.",
			Reply:   "array: loss, right answers, samples, 1 if the step was applied or 0 if it had been applied before",
			Min:     14, Access: All, FirstKey: 1, LastKey: 5, run: runTrain,
		},
	}
}

func runModel(c *Call) error {
	size, err := c.Payload.Size()
	if err != nil {
		return err
	}
	if size > maxModel {
		return refuse("TOOLARGE", "a definition of %d bytes, at most %d are allowed", size, maxModel)
	}
	text := make([]byte, size)
	if err := c.Payload.Read(text, nil); err != nil {
		return err
	}
	spec, err := readModel(text)
	if err != nil {
		return err
	}
	n, err := c.DB.SetModel(c.arg(0), spec)
	if err != nil {
		return err
	}
	c.Reply.Int(int64(n))
	return nil
}

func runInit(c *Call) error {
	seed, err := unsigned("seed", c.Args[2])
	if err != nil {
		return err
	}
	if err := c.DB.InitModel(c.arg(0), c.arg(1), seed); err != nil {
		return err
	}
	return c.ok()
}

// samples reads scale, offset and rows.
func (s *Samples) read(args, rows [][]byte) (err error) {
	if s.Scale, err = float("scale", args[0]); err != nil {
		return err
	}
	if s.Offset, err = float("offset", args[1]); err != nil {
		return err
	}
	s.Rows = make([]int, len(rows))
	for i, r := range rows {
		if s.Rows[i], err = number("row", r, 0, math.MaxInt); err != nil {
			return err
		}
	}
	return nil
}

func (c *Call) score(s nn.Score) {
	c.Reply.Double(s.Loss)
	c.Reply.Int(int64(s.Correct))
	c.Reply.Int(int64(s.Samples))
}

func runGradient(c *Call) error {
	s := Samples{Model: c.arg(1), Params: c.arg(2), Images: c.arg(3), Labels: c.arg(4)}
	minibatch, err := number("minibatch", c.Args[5], 0, maxMinibatches)
	if err != nil {
		return err
	}
	if err := s.read(c.Args[6:8], c.Args[8:]); err != nil {
		return err
	}
	score, status, err := c.DB.Gradient(s, c.arg(0), minibatch)
	if err != nil {
		return err
	}
	c.Reply.Array(4)
	c.score(score)
	return c.status(status)
}

func runEvaluate(c *Call) error {
	s := Samples{Model: c.arg(0), Params: c.arg(1), Images: c.arg(2), Labels: c.arg(3)}
	if err := s.read(c.Args[4:6], c.Args[6:]); err != nil {
		return err
	}
	score, err := c.DB.Evaluate(s)
	if err != nil {
		return err
	}
	c.Reply.Array(3)
	c.score(score)
	return nil
}

func runTrain(c *Call) error {
	s := Samples{Params: c.arg(0), Model: c.arg(2), Images: c.arg(3), Labels: c.arg(4)}
	n, err := number("rows", c.Args[7], 1, maxTrainRows)
	if err != nil {
		return err
	}
	at := slices.IndexFunc(c.Args[8:], func(a []byte) bool { return strings.EqualFold(string(a), "STEP") })
	if at != n {
		return refuse("ERR", "%d rows, but STEP comes after %d: use %s", n, at, c.cmd.Usage())
	}
	if err := s.read(c.Args[5:7], c.Args[8:8+n]); err != nil {
		return err
	}
	step, config, err := readStep(c, c.strings(8+n))
	if err != nil {
		return err
	}
	score, applied, err := c.DB.Train(s, c.arg(1), step, config)
	if err != nil {
		return err
	}
	done := int64(0)
	if applied {
		done = 1
	}
	c.Reply.Array(4)
	c.score(score)
	c.Reply.Int(done)
	return nil
}

// Package gradient is the function that SPIRT's peers invoke: it computes the gradient of one minibatch, or evaluates a
// model. It keeps no state that matters: what it needs it reads from its peer's tensor database, and its gradient goes
// into the sum there.
//
// [Main] is a whole program for the Lambda Runtime API. [Handler] is the same without the runtime; give it an [Event].
//
// What an instance keeps while it is warm only saves time: the connection, the parameters by key and version, the model
// with its memory. A gradient may be pushed twice, by an instance that is killed after its push and by its retry: the
// database counts each minibatch once.
//
// Limits: images and labels are uint8, the batch is at most [MaxRows], one invocation at a time.
package gradient

import (
	"cmp"
	"context"
	"errors"
	"os"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/spirt-ml/spirt/nn"
	"github.com/spirt-ml/spirt/resp"
	"github.com/spirt-ml/spirt/tensor"
)

// dialTimeout bounds connecting to the database; it is on this machine or next to it.
const dialTimeout = 5 * time.Second

// Config says how a Handler reaches its database.
type Config struct {
	Token    string // for AUTH where the event has none; empty: none
	MemoryMB int    // a model and minibatch that need more are refused; 0: not limited
}

// Handler computes. It is not safe for concurrent use.
type Handler struct {
	config Config

	at    Database // of conn and of what was read; without token
	conn  *resp.Conn
	shown string // the token that conn showed last

	model    *nn.Model
	spec     nn.Spec // of model
	samples  *nn.Minibatch
	held     Parameters // what params has; version 0: nothing
	params   []float32
	gradient []float32
	args     [3][]any // of commands that are sent at once
}

// NewHandler makes a Handler. It does nothing yet, so that an instance starts fast.
func NewHandler(c Config) *Handler { return &Handler{config: c} }

// Close closes the connection.
func (h *Handler) Close() error {
	if h.conn == nil {
		return nil
	}
	conn := h.conn
	h.conn = nil
	return conn.Close()
}

// Invoke runs an event. Its errors are of type *[Error].
func (h *Handler) Invoke(ctx context.Context, e Event) (Result, error) {
	if err := e.validate(); err != nil {
		return Result{}, err
	}
	run := &run{h: h, e: e}
	if err := h.prepare(e); err != nil {
		return Result{}, err
	}
	compute := run.evaluate
	if e.Task == TaskGradient {
		compute = run.computeGradient
	}
	if err := compute(ctx); err != nil {
		return Result{}, err
	}
	return run.result, nil
}

// prepare has the model and the memory for an event ready.
func (h *Handler) prepare(e Event) error {
	if h.model == nil || !reflect.DeepEqual(h.spec, e.Model) {
		model, err := nn.New(e.Model)
		if err != nil {
			return bad("%v", err)
		}
		h.model, h.spec = model, e.Model
		h.samples, h.held = model.NewMinibatch(), Parameters{}
		h.params, h.gradient = nil, nil
	}
	batch := nn.Chunk
	if e.Task == TaskGradient {
		batch = len(e.Rows)
	}
	n := h.model.NumParams()
	if batch > h.samples.Room() {
		need := h.model.MinibatchSize(batch) + 8*int64(n)
		if limit := int64(h.config.MemoryMB) << 20; limit > 0 && need > limit {
			return bad("model %q with a minibatch of %d needs %d MB, the function has %d: take a smaller minibatch or more memory",
				e.Model.Name, batch, need>>20+1, h.config.MemoryMB)
		}
		h.samples.Grow(batch)
	}
	if h.params == nil {
		h.params = make([]float32, n)
	}
	if h.gradient == nil && e.Task == TaskGradient {
		h.gradient = make([]float32, n)
	}
	h.samples.Normalise(e.Scale, e.Offset)
	return nil
}

// run is one event under way.
type run struct {
	h      *Handler
	e      Event
	result Result
	redone bool // the connection broke once
	asked  bool // for the parameters
}

// read has the given rows in h.x and h.labels, and the parameters of the event
// in h.params. It asks for all at once.
func (r *run) read(ctx context.Context, rows []int) error {
	start := time.Now()
	h := r.h
	at := r.e.Database
	at.Token = ""
	if h.at != at {
		h.Close()
		h.at, h.held = at, Parameters{}
	}
	if at.Stored {
		labels, images, err := r.readStored(ctx, rows)
		if err != nil {
			return err
		}
		got := time.Now()
		r.result.Seconds.Read += got.Sub(start).Seconds()
		if err := r.takeSamples(labels, images, rows); err != nil {
			return err
		}
		r.result.Seconds.Compute += time.Since(got).Seconds()
		return nil
	}
	commands := make([]resp.Command, 0, 3)
	for i, key := range []string{r.e.Labels, r.e.Images} {
		args := append(h.args[i][:0], "TENSOR.ROWS", key)
		for _, row := range rows {
			args = append(args, row)
		}
		h.args[i] = args
		commands = append(commands, resp.Command{Args: args})
	}
	want, held := r.e.Parameters, h.held
	if held.Key != want.Key {
		held = Parameters{}
	}
	ask := held.Version == 0 || want.Version != 0 && held.Version != want.Version || want.Version == 0 && !r.asked
	if ask {
		h.held = Parameters{} // the reply is read into h.params
		args := append(h.args[2][:0], "TENSOR.GET", want.Key)
		if held.Version != 0 {
			args = append(args, "IFNOT", strconv.FormatUint(held.Version, 10))
		}
		h.args[2] = args
		commands = append(commands, resp.Command{Args: args, Dst: tensor.Bytes(h.params)})
	}
	replies, err := r.do(ctx, commands...)
	if err != nil {
		return err
	}
	if ask {
		if err := r.takeParameters(replies[2], held); err != nil {
			return err
		}
		r.asked = true
	}
	got := time.Now()
	r.result.Seconds.Read += got.Sub(start).Seconds()
	if err := r.takeSamples(replies[0], replies[1], rows); err != nil {
		return err
	}
	r.result.Seconds.Compute += time.Since(got).Seconds()
	return nil
}

// takeParameters checks the answer to TENSOR.GET, whose bytes are in h.params
// already; held is what they were before.
func (r *run) takeParameters(reply resp.Reply, held Parameters) error {
	h, want := r.h, r.e.Parameters
	if reply.Kind == resp.Nil && held.Version != 0 && want.Version == 0 {
		h.held = held
		return nil
	}
	if reply.Kind == resp.Nil {
		if held.Version == 0 {
			return fail(DatabaseFailed, "no answer to TENSOR.GET %q", want.Key)
		}
		h.held = held
		return fail(Stale, "parameters %q are at version %d, wanted %d", want.Key, held.Version, want.Version)
	}
	if reply.Kind != resp.Array || len(reply.Elems) != 4 || reply.Elems[1].Kind != resp.Array || reply.Elems[2].Kind != resp.Int || reply.Elems[3].Kind != resp.Bulk {
		return fail(DatabaseFailed, "the answer to TENSOR.GET %q is not a tensor", want.Key)
	}
	dtype, dims, version, data := string(reply.Elems[0].Bytes), reply.Elems[1].Elems, uint64(reply.Elems[2].Int), reply.Elems[3].Bytes
	if dtype != "float32" || len(dims) != 1 || len(data) != 4*len(h.params) {
		return bad("parameters %q are %s with %d dimensions and %d bytes, but model %q has %d float32 parameters in 1 dimension",
			want.Key, dtype, len(dims), len(data), r.e.Model.Name, len(h.params))
	}
	if want.Version != 0 && version != want.Version {
		return fail(Stale, "parameters %q are at version %d, wanted %d", want.Key, version, want.Version)
	}
	h.held = Parameters{Key: want.Key, Version: version}
	return nil
}

// takeSamples checks the answers to TENSOR.ROWS and normalises the images.
func (r *run) takeSamples(labels, images resp.Reply, rows []int) error {
	for key, reply := range map[string]resp.Reply{r.e.Labels: labels, r.e.Images: images} {
		if reply.Kind != resp.Bulk {
			return fail(DatabaseFailed, "the answer to TENSOR.ROWS %q is not a string", key)
		}
	}
	if err := r.h.samples.Load(images.Bytes, labels.Bytes, rows); err != nil {
		return bad("images %q and labels %q: %v", r.e.Images, r.e.Labels, err)
	}
	return nil
}

func (r *run) computeGradient(ctx context.Context) error {
	h := r.h
	if err := r.read(ctx, r.e.Rows); err != nil {
		return err
	}
	start := time.Now()
	score, err := h.samples.Gradient(h.gradient, h.params)
	r.score(score)
	computed := time.Now()
	r.result.Seconds.Compute += computed.Sub(start).Seconds()
	if err != nil {
		return r.notFinite(err)
	}

	if r.e.Database.Stored {
		err := r.store(ctx)
		r.result.Seconds.Write = time.Since(computed).Seconds()
		return err
	}
	h.args[0] = append(h.args[0][:0], "TENSOR.ACCUMULATE", r.e.Accumulate, r.e.Minibatch, tensor.Bytes(h.gradient))
	replies, err := r.do(ctx, resp.Command{Args: h.args[0]})
	if err != nil {
		return err
	}
	r.result.Seconds.Write = time.Since(computed).Seconds()
	switch status := string(replies[0].Bytes); status {
	case "COUNTED", "BUFFERED", "DUPLICATE":
		r.result.Status = strings.ToLower(status)
	default:
		return fail(DatabaseFailed, "the answer to TENSOR.ACCUMULATE is %.40q", status)
	}
	return nil
}

func (r *run) evaluate(ctx context.Context) error {
	h := r.h
	start := time.Now()
	score, err := h.samples.Evaluate(h.params, r.e.Rows, func(rows []int) error { return r.read(ctx, rows) })
	r.result.Seconds.Compute = time.Since(start).Seconds() - r.result.Seconds.Read
	r.score(score)
	if errors.Is(err, nn.ErrNotFinite) {
		return r.notFinite(err)
	}
	return err
}

func (r *run) score(s nn.Score) {
	r.result.Loss, r.result.Correct, r.result.Samples = s.Loss, s.Correct, s.Samples
}

func (r *run) notFinite(err error) error {
	return fail(NotFinite, "minibatch %d: %v", r.e.Minibatch, err)
}

// do sends commands, after AUTH where the connection has not shown the event's token, in one piece; where the connection is or becomes broken, once again on a new one. All commands used here may be
// repeated.
func (r *run) do(ctx context.Context, commands ...resp.Command) ([]resp.Reply, error) {
	h := r.h
	token := cmp.Or(r.e.Database.Token, h.config.Token)
	for {
		if h.conn == nil {
			conn, err := resp.Dial(ctx, h.at.Network, h.at.Address, resp.DialOptions{
				Timeout: dialTimeout, Limits: resp.Limits{MaxBulk: 4 * nn.MaxParams},
			})
			if err != nil {
				return nil, r.classify(err)
			}
			h.conn, h.shown = conn, ""
		}
		send, first := commands, 0
		if token != h.shown {
			auth := []any{"AUTH", r.e.Database.User, token}
			if r.e.Database.User == "" {
				auth = []any{"AUTH", token}
			}
			send = []resp.Command{{Args: auth}}
			if r.e.Database.Index != 0 {
				send = append(send, resp.Command{Args: []any{"SELECT", r.e.Database.Index}})
			}
			first = len(send)
			send = append(send, commands...)
		}
		replies, err := h.conn.DoAll(ctx, send...)
		if err == nil {
			h.shown = token
			return replies[first:], nil
		}
		h.shown = "" // what the connection may do is not known
		var refused *resp.Error
		if errors.As(err, &refused) {
			return nil, r.classify(err)
		}
		h.Close()
		if ctx.Err() != nil || r.redone {
			return nil, r.classify(err)
		}
		r.redone = true
	}
}

// classify gives an error of the database the type that tells the platform whether to try again.
func (r *run) classify(err error) error {
	if err == nil {
		return nil
	}
	var refused *resp.Error
	if !errors.As(err, &refused) {
		return fail(DatabaseUnavailable, "database at %s: %v", r.e.Database.Address, err)
	}
	switch refused.Code {
	case "NOTFINITE":
		return fail(NotFinite, "minibatch %d: %v", r.e.Minibatch, err)
	case "NOAUTH", "WRONGPASS", "NOPERM", "NOPROTO", "NOKEY", "OUTOFRANGE", "TOOLARGE", "WRONGTYPE":
		return fail(Refused, "minibatch %d: %v", r.e.Minibatch, err)
	}
	return fail(DatabaseFailed, "minibatch %d: %v", r.e.Minibatch, err)
}

// tokenVariable holds the database token of an instance.
const tokenVariable = "SPIRT_DB_TOKEN"

// configFromEnv reads the Config of an instance.
func configFromEnv() Config {
	memory, err := strconv.Atoi(os.Getenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE"))
	if err != nil || memory < 0 {
		memory = 0 // not on a platform that limits it
	}
	return Config{Token: os.Getenv(tokenVariable), MemoryMB: memory}
}

package tensordb

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/nn"
	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/resp"
	"github.com/spirt-ml/spirt/tensor"
)

// Address is a database in another process, as a URL names it.
type Address struct {
	Network  string // "tcp", "tls" or "unix"
	Address  string // host:port, or the path of a socket
	User     string // for AUTH; may be empty
	Password string // for AUTH: a token of a Server, or a password of Redis; empty: no AUTH
	Index    int    // of a Redis server's databases
}

// ParseAddress reads redis://[user[:password]@]host[:port][/index], rediss://
// for TLS, or unix://[user[:password]@]/path. Its errors do not tell the
// password.
func ParseAddress(text string) (Address, error) {
	u, err := url.Parse(text)
	if err != nil {
		return Address{}, errors.New("the database's address is not a URL: take redis://host:port, rediss://host:port or unix:///path")
	}
	a := Address{}
	if u.User != nil {
		a.User = u.User.Username()
		a.Password, _ = u.User.Password()
		if _, set := u.User.Password(); !set { // a token alone
			a.User, a.Password = "", a.User
		}
	}
	switch u.Scheme {
	case "redis", "rediss":
		a.Network = "tcp"
		if u.Scheme == "rediss" {
			a.Network = "tls"
		}
		if u.Hostname() == "" {
			return Address{}, fmt.Errorf("the database's address %s names no host", u.Redacted())
		}
		port := u.Port()
		if port == "" {
			port = "6379"
		}
		a.Address = net.JoinHostPort(u.Hostname(), port)
		if index := strings.Trim(u.Path, "/"); index != "" {
			if a.Index, err = strconv.Atoi(index); err != nil || a.Index < 0 || a.Index > 1<<16 {
				return Address{}, fmt.Errorf("the database's address %s: %q is no number of a database", u.Redacted(), index)
			}
		}
	case "unix":
		if u.Host != "" || u.Path == "" {
			return Address{}, fmt.Errorf("the database's address %s: take unix:///path with three slashes", u.Redacted())
		}
		a.Network, a.Address = "unix", u.Path
	default:
		return Address{}, fmt.Errorf("the database's address %s: take redis://, rediss:// or unix://", u.Redacted())
	}
	return a, nil
}

// String names the database without its password.
func (a Address) String() string { return a.Network + "://" + a.Address }

// ClientConfig says how a Client behaves.
type ClientConfig struct {
	// TLS is how to connect where the address says so. Nil: as the system
	// trusts.
	TLS *tls.Config
	// CacheBytes bounds the tensors that were read or written and are kept, in
	// case they are read again. Zero: 256 MiB.
	CacheBytes int64
	// Timeout bounds one command. Zero: 2 minutes.
	Timeout time.Duration
}

// Client is a database in another process: `spirt db`, or a Redis server with
// the module. Its methods are those of a DB, but for checkpoints, which are
// the server's own. What was read stays in memory for a while, since bodies
// are read chunk by chunk. A command is sent again when the connection breaks.
// It is safe for concurrent use.
type Client struct {
	address Address
	config  ClientConfig
	mem     memory

	mu     sync.Mutex
	idle   []*resp.Conn
	closed bool
	cache  map[string]*cached
	held   int64 // bytes of cache
	clock  int64
}

// cached is a tensor that was read or written.
type cached struct {
	blob *blob
	meta Meta
	used int64
}

// maxIdleConns bounds the connections that are kept.
const maxIdleConns = 8

// Connect connects to a database.
func Connect(ctx context.Context, address Address, config ClientConfig) (*Client, error) {
	if config.CacheBytes <= 0 {
		config.CacheBytes = 256 << 20
	}
	if config.Timeout <= 0 {
		config.Timeout = 2 * time.Minute
	}
	c := &Client{address: address, config: config, mem: memory{pool: make(map[int][][]byte)}, cache: make(map[string]*cached)}
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	c.put(conn)
	return c, nil
}

func (c *Client) dial(ctx context.Context) (*resp.Conn, error) {
	return c.address.Dial(ctx, resp.DialOptions{Timeout: c.config.Timeout, TLS: c.config.TLS, Limits: resp.Limits{MaxBulk: 4 << 30, MaxArgs: 1 << 20}})
}

// Dial connects and authenticates; opts.Token and opts.User are the address's.
func (a Address) Dial(ctx context.Context, opts resp.DialOptions) (*resp.Conn, error) {
	opts.User, opts.Token = a.User, a.Password
	conn, err := resp.Dial(ctx, a.Network, a.Address, opts)
	if err != nil {
		return nil, err
	}
	if a.Index != 0 {
		if _, err := conn.Do(ctx, "SELECT", a.Index); err != nil {
			conn.Close()
			return nil, fmt.Errorf("choosing database %d at %s: %w", a.Index, a, err)
		}
	}
	return conn, nil
}

// Close closes the connections. References stay valid.
func (c *Client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for _, conn := range c.idle {
		conn.Close()
	}
	c.idle = nil
	for _, e := range c.cache {
		e.blob.release()
	}
	clear(c.cache)
	c.mem.close()
	return nil
}

func (c *Client) put(conn *resp.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || len(c.idle) >= maxIdleConns {
		conn.Close()
		return
	}
	c.idle = append(c.idle, conn)
}

// Do sends one command and passes its reply to use, which must not keep it.
// All commands that are sent here may be sent again.
func (c *Client) Do(use func(resp.Reply) error, args ...any) error { return c.do(nil, use, args...) }

func (c *Client) do(dst []byte, use func(resp.Reply) error, args ...any) error {
	ctx, cancel := context.WithTimeout(context.Background(), c.config.Timeout)
	defer cancel()
	for again := true; ; again = false {
		c.mu.Lock()
		if c.closed {
			c.mu.Unlock()
			return ErrClosed
		}
		var conn *resp.Conn
		fresh := len(c.idle) == 0
		if !fresh {
			conn = c.idle[len(c.idle)-1]
			c.idle = c.idle[:len(c.idle)-1]
		}
		c.mu.Unlock()
		if fresh {
			var err error
			if conn, err = c.dial(ctx); err != nil {
				return err
			}
		}
		reply, err := conn.DoInto(ctx, dst, args...)
		var refused *resp.Error
		switch {
		case err == nil:
			if use != nil {
				err = use(reply)
			}
			c.put(conn)
			return err
		case errors.As(err, &refused):
			c.put(conn)
			return c.refusal(refused)
		}
		conn.Close()
		if !again && fresh || ctx.Err() != nil {
			return fmt.Errorf("the database at %s: %w", c.address, err)
		}
	}
}

// refusal turns an error reply into the error of this package that it stands
// for.
func (c *Client) refusal(e *resp.Error) error {
	for is, code := range map[error]string{
		ErrNoKey: "NOKEY", ErrNotFinite: "NOTFINITE", ErrOutOfRange: "OUTOFRANGE", ErrWrongType: "WRONGTYPE", ErrIncomplete: "INCOMPLETE", ErrMemory: "OOM",
	} {
		if e.Code == code {
			text := e.Message
			if rest, ok := strings.CutPrefix(text, is.Error()+": "); ok {
				text = rest
			}
			return fmt.Errorf("%w: %s", is, text)
		}
	}
	return fmt.Errorf("the database at %s: %w", c.address, e)
}

func integer(to *int64) func(resp.Reply) error {
	return func(r resp.Reply) error {
		if r.Kind != resp.Int {
			return errors.New("the database's answer is not a number")
		}
		*to = r.Int
		return nil
	}
}

// Knows reports whether the server has a command.
func (c *Client) Knows(command string) (has bool, err error) {
	err = c.Do(func(r resp.Reply) error {
		has = r.Kind == resp.Array && len(r.Elems) == 1 && r.Elems[0].Kind == resp.Array
		return nil
	}, "COMMAND", "INFO", command)
	return has, err
}

// Sign returns the token that stands for g at this server. It needs one of
// this package; see Knows and GRANT.
func (c *Client) Sign(g Grant) (token string, err error) {
	accumulate, minibatch := g.Accumulate, g.Minibatch
	if accumulate == "" {
		accumulate, minibatch = g.Read[0], -1
	}
	args := append([]any{"GRANT", int64(min(g.Life, maxGrantLife) / time.Second), minibatch, accumulate}, words("", g.Read...)[1:]...)
	err = c.Do(func(r resp.Reply) error {
		token = string(r.Bytes)
		return nil
	}, args...)
	return token, err
}

// Set stores a copy of t under key and returns its version.
func (c *Client) Set(key string, t tensor.Tensor) (uint64, error) {
	if err := t.Validate(); err != nil {
		return 0, fmt.Errorf("setting %q: %w: %w", key, ErrWrongType, err)
	}
	return c.set(key, t)
}

func (c *Client) set(key string, t tensor.Tensor) (uint64, error) {
	args := []any{"TENSOR.SET", key, t.DType.String(), len(t.Shape)}
	for _, d := range t.Shape {
		args = append(args, d)
	}
	var version int64
	err := c.Do(integer(&version), append(args, t.Data)...)
	return uint64(version), err
}

// Draft returns a tensor of this dtype and shape to be filled. It travels at
// Commit.
func (c *Client) Draft(dtype tensor.DType, shape ...int) (*Draft, error) {
	n, err := tensor.DataLen(dtype, shape)
	if err != nil {
		return nil, fmt.Errorf("drafting a tensor: %w: %w", ErrWrongType, err)
	}
	b, err := c.mem.alloc(n)
	if err != nil {
		return nil, fmt.Errorf("drafting a tensor: %w", err)
	}
	put := func(key string, meta Meta, _ Buffer) (uint64, error) {
		defer b.release()
		version, err := c.set(key, tensor.Tensor{DType: meta.DType, Shape: meta.Shape, Data: b.data})
		if err == nil {
			meta.Version = version
			c.keep(key, meta, b)
		}
		return version, err
	}
	return &Draft{put: put, buffer: b, meta: Meta{DType: dtype, Shape: slices.Clone(shape)}}, nil
}

// keep puts a tensor into the cache and drops those that were used longest ago
// for it.
func (c *Client) keep(key string, meta Meta, b *blob) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || int64(len(b.data)) > c.config.CacheBytes {
		return
	}
	c.dropLocked(key)
	for c.held+int64(len(b.data)) > c.config.CacheBytes {
		oldest := ""
		for k, e := range c.cache {
			if oldest == "" || e.used < c.cache[oldest].used {
				oldest = k
			}
		}
		c.dropLocked(oldest)
	}
	c.clock++
	c.cache[key] = &cached{blob: b.retain(), meta: meta, used: c.clock}
	c.held += int64(len(b.data))
}

func (c *Client) dropLocked(key string) {
	if e := c.cache[key]; e != nil {
		c.held -= int64(len(e.blob.data))
		e.blob.release()
		delete(c.cache, key)
	}
}

func (c *Client) drop(keys ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, key := range keys {
		c.dropLocked(key)
	}
}

// fetchPiece is how much of a tensor one reply has.
const fetchPiece = 64 << 20

// Get returns the current version of key, or ErrNoKey. Release it.
func (c *Client) Get(key string) (*Ref, error) {
	for {
		ref, err := c.try(key)
		if ref != nil || err != nil {
			return ref, err
		}
	}
}

// try returns nil if the tensor was replaced while it was read.
func (c *Client) try(key string) (*Ref, error) {
	meta, err := c.Stat(key)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	if e := c.cache[key]; e != nil && e.meta.Version == meta.Version {
		c.clock++
		e.used = c.clock
		b := e.blob.retain()
		c.mu.Unlock()
		return NewRef(meta, b.data, b.sum, b.release), nil
	}
	c.mu.Unlock()
	b, err := c.mem.alloc(meta.Len() * meta.DType.Size())
	if err != nil {
		return nil, err
	}
	for at := 0; at < len(b.data); at += fetchPiece {
		part := b.data[at:min(at+fetchPiece, len(b.data))]
		version := uint64(0)
		err := c.do(part, func(r resp.Reply) error {
			if r.Kind != resp.Array || len(r.Elems) != 2 || r.Elems[0].Kind != resp.Int || r.Elems[1].Kind != resp.Bulk {
				return errors.New("the database's answer to TENSOR.RANGE is not a part of a tensor")
			}
			if version = uint64(r.Elems[0].Int); version == meta.Version && len(r.Elems[1].Bytes) != len(part) {
				return errors.New("the database's answer to TENSOR.RANGE is too short")
			}
			if len(part) > 0 && len(r.Elems[1].Bytes) == len(part) && &r.Elems[1].Bytes[0] != &part[0] {
				copy(part, r.Elems[1].Bytes)
			}
			return nil
		}, "TENSOR.RANGE", key, at, len(part))
		if err != nil || version != meta.Version {
			b.release()
			return nil, err
		}
	}
	c.keep(key, meta, b)
	return NewRef(meta, b.data, b.sum, b.release), nil
}

// Stat returns what is known of a tensor, or ErrNoKey.
func (c *Client) Stat(key string) (Meta, error) {
	var m Meta
	err := c.Do(func(r resp.Reply) error {
		var err error
		m, err = readMeta(r)
		return err
	}, "TENSOR.META", key)
	return m, err
}

func readMeta(r resp.Reply) (m Meta, err error) {
	bad := errors.New("the database's answer to TENSOR.META is not what it should be")
	if r.Kind != resp.Array || len(r.Elems)%2 != 0 {
		return m, bad
	}
	for i := 0; i < len(r.Elems); i += 2 {
		value := r.Elems[i+1]
		switch string(r.Elems[i].Bytes) {
		case "dtype":
			if m.DType, err = tensor.ParseDType(string(value.Bytes)); err != nil {
				return m, err
			}
		case "shape":
			m.Shape = []int{}
			for _, d := range value.Elems {
				m.Shape = append(m.Shape, int(d.Int))
			}
		case "version":
			m.Version = uint64(value.Int)
		case "step":
			m.Step = uint64(value.Int)
		case "kind":
			m.Gradient = string(value.Bytes) == "gradient"
		}
	}
	if _, err := tensor.DataLen(m.DType, m.Shape); err != nil {
		return m, bad
	}
	return m, nil
}

// Exists reports whether there is a tensor under key. Where the database does
// not answer there is none.
func (c *Client) Exists(key string) bool {
	_, err := c.Stat(key)
	return err == nil
}

// Delete removes tensors and accumulators, and returns how many keys there
// were.
func (c *Client) Delete(keys ...string) int {
	if len(keys) == 0 {
		return 0
	}
	c.drop(keys...)
	var n int64
	if err := c.Do(integer(&n), words("TENSOR.DEL", keys...)...); err != nil {
		return 0
	}
	return int(n)
}

// words makes arguments of a command's name and keys.
func words(name string, keys ...string) []any {
	args := []any{name}
	for _, key := range keys {
		args = append(args, key)
	}
	return args
}

// Keys returns the keys that start with prefix, sorted; none where the
// database does not answer.
func (c *Client) Keys(prefix string) []string {
	pattern := strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(prefix) + "*"
	found := map[string]bool{}
	for cursor := "0"; ; {
		err := c.Do(func(r resp.Reply) error {
			if r.Kind != resp.Array || len(r.Elems) != 2 || r.Elems[1].Kind != resp.Array {
				return errors.New("the database's answer to SCAN is not what it should be")
			}
			cursor = string(r.Elems[0].Bytes)
			for _, key := range r.Elems[1].Elems {
				found[string(key.Bytes)] = true
			}
			return nil
		}, "SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
		if err != nil {
			return nil
		}
		if cursor == "0" {
			break
		}
	}
	keys := make([]string, 0, len(found))
	for key := range found {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

// Copy makes dst a tensor with the bytes, step and kind of src.
func (c *Client) Copy(dst, src string) error { return c.Do(nil, "TENSOR.COPY", dst, src) }

// Rename makes dst what src was, and removes src.
func (c *Client) Rename(dst, src string) error {
	err := c.Do(nil, "TENSOR.RENAME", dst, src)
	if errors.Is(err, ErrNoKey) && c.Exists(dst) {
		err = nil // it was sent twice
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropLocked(dst)
	c.dropLocked(src)
	return err
}

// Hash returns the tree hash of the raw bytes of key.
func (c *Client) Hash(key string) (h treehash.Hash, err error) {
	err = c.Do(func(r resp.Reply) error { return h.UnmarshalText(r.Bytes) }, "TENSOR.HASH", key)
	return h, err
}

// SetStep notes that a tensor is the state of an optimizer after so many
// steps.
func (c *Client) SetStep(key string, step uint64) error {
	return c.Do(nil, "TENSOR.STEP", key, strconv.FormatUint(step, 10))
}

// Accumulator makes key an empty running sum. See DB.Accumulator.
func (c *Client) Accumulator(key string, length, minibatches, window int) error {
	return c.Do(nil, "TENSOR.ACCUMULATOR", key, length, minibatches, window)
}

// Accumulate adds the gradient of a minibatch to a running sum. See
// DB.Accumulate.
func (c *Client) Accumulate(key string, minibatch int, gradient []float32) (status Status, err error) {
	err = c.Do(func(r resp.Reply) error {
		status, err = readStatus(r.Bytes)
		return err
	}, "TENSOR.ACCUMULATE", key, minibatch, tensor.Bytes(gradient))
	return status, err
}

// Skip leaves a minibatch out of the sum for good. See DB.Skip.
func (c *Client) Skip(key string, minibatch int) error {
	return c.Do(nil, "TENSOR.SKIP", key, minibatch)
}

// Average stores the average of a running sum under dst. See DB.Average.
func (c *Client) Average(dst, key string) (counted int, err error) {
	var n int64
	err = c.Do(integer(&n), "TENSOR.AVERAGE", dst, key)
	return int(n), err
}

// Half stores the float32 tensor src under dst as float16; unlike DB.Half it
// makes what is out of range infinite.
func (c *Client) Half(dst, src string) error {
	return c.Do(nil, "TENSOR.CAST", dst, src, tensor.Float16.String())
}

// Mean stores the mean of tensors under dst. See DB.Mean.
func (c *Client) Mean(dst string, keys []string, weights []uint32) error {
	if _, err := checkWeights(keys, weights); err != nil {
		return err
	}
	if len(keys) == 0 {
		return fmt.Errorf("%w: the mean of no tensors", ErrOutOfRange)
	}
	args := []any{"TENSOR.MEAN", dst}
	if weights != nil {
		args[0] = "TENSOR.WMEAN"
	}
	for i, key := range keys {
		if weights != nil {
			args = append(args, int64(weights[i]))
		}
		args = append(args, key)
	}
	return c.Do(nil, args...)
}

// Update applies a gradient as a step of an optimizer. See DB.Update.
func (c *Client) Update(k UpdateKeys, step uint64, o optim.Config) (applied bool, err error) {
	args := words("TENSOR.UPDATE", k.Params, k.State, k.Gradient)
	if k.IntoParams != "" || k.IntoState != "" {
		args = words("TENSOR.UPDATEINTO", k.IntoParams, k.IntoState, k.Params, k.State, k.Gradient)
	}
	args = append(args, "STEP", strconv.FormatUint(step, 10))
	for _, word := range o.Args() {
		args = append(args, word)
	}
	var n int64
	err = c.Do(integer(&n), args...)
	return n == 1, err
}

// SetModel stores a model's definition under key. See DB.SetModel.
func (c *Client) SetModel(key string, spec nn.Spec) (params int, err error) {
	text, err := json.Marshal(spec)
	if err != nil {
		return 0, err
	}
	var n int64
	err = c.Do(integer(&n), "TENSOR.MODEL", key, text)
	return int(n), err
}

// Gradient has the database compute a gradient and add it to a running sum. See
// DB.Gradient.
func (c *Client) Gradient(s Samples, accumulate string, minibatch int) (score nn.Score, status Status, err error) {
	args := []any{"TENSOR.GRADIENT", accumulate, s.Model, s.Params, s.Images, s.Labels, minibatch, s.Scale, s.Offset}
	for _, row := range s.Rows {
		args = append(args, row)
	}
	err = c.Do(func(r resp.Reply) error {
		if err := readScore(r, 4, &score); err != nil {
			return err
		}
		status, err = readStatus(r.Elems[3].Bytes)
		return err
	}, args...)
	return score, status, err
}

// Evaluate has the database evaluate a model. See DB.Evaluate.
func (c *Client) Evaluate(s Samples) (score nn.Score, err error) {
	args := []any{"TENSOR.EVALUATE", s.Model, s.Params, s.Images, s.Labels, s.Scale, s.Offset}
	for _, row := range s.Rows {
		args = append(args, row)
	}
	err = c.Do(func(r resp.Reply) error { return readScore(r, 3, &score) }, args...)
	return score, err
}

func readScore(r resp.Reply, parts int, score *nn.Score) (err error) {
	if r.Kind != resp.Array || len(r.Elems) != parts {
		return errors.New("the database's answer is not a score")
	}
	score.Loss, err = strconv.ParseFloat(string(r.Elems[0].Bytes), 64)
	score.Correct, score.Samples = int(r.Elems[1].Int), int(r.Elems[2].Int)
	return err
}

func readStatus(text []byte) (Status, error) {
	for s := Counted; s <= Duplicate; s++ {
		if strings.EqualFold(string(text), s.String()) {
			return s, nil
		}
	}
	return 0, fmt.Errorf("the database's answer is %.40q, which is no status", text)
}

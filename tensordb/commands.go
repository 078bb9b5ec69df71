package tensordb

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/spirt-ml/spirt/internal/kernel"
	"github.com/spirt-ml/spirt/optim"
	"github.com/spirt-ml/spirt/resp"
	"github.com/spirt-ml/spirt/tensor"
)

// command describes a command. docs/tensordb.md is its manual.
type command struct {
	usage    string
	min, max int // arguments with the name; max 0: no maximum
	access   Access
	stranger bool // allowed before AUTH
	payload  bool // the last argument is the bytes of a tensor, read by run
	// Arguments firstKey to lastKey are keys; lastKey -1 is the last one, and
	// firstKey 0 means none. With pairs, only every other one of them is.
	firstKey, lastKey int
	pairs             bool
	run               func(c *conn, args [][]byte) error // args without the name
}

// commands holds the commands by upper-case name.
var commands = map[string]*command{
	"AUTH":  {usage: "AUTH [user] token", min: 2, max: 3, stranger: true, run: (*conn).auth},
	"HELLO": {usage: "HELLO [2 [AUTH user token]]", min: 1, max: 7, stranger: true, run: (*conn).hello},
	"QUIT":  {usage: "QUIT", min: 1, max: 1, stranger: true, run: (*conn).bye},
	"PING":  {usage: "PING [message]", min: 1, max: 2, run: (*conn).ping},
	"INFO":  {usage: "INFO [section]", min: 1, max: 2, run: (*conn).info},

	"EXISTS": {usage: "EXISTS key [key ...]", min: 2, firstKey: 1, lastKey: -1, run: (*conn).exists},
	"KEYS":   {usage: "KEYS prefix*", min: 2, max: 2, run: (*conn).keys},
	"DEL":    {usage: "DEL key [key ...]", min: 2, access: All, firstKey: 1, lastKey: -1, run: (*conn).del},

	"TENSOR.SET":  {usage: "TENSOR.SET key dtype rank dim ... bytes", min: 5, max: 5 + tensor.MaxRank, access: All, payload: true, firstKey: 1, lastKey: 1, run: (*conn).set},
	"TENSOR.GET":  {usage: "TENSOR.GET key [IFNOT version]", min: 2, max: 4, firstKey: 1, lastKey: 1, run: (*conn).get},
	"TENSOR.ROWS": {usage: "TENSOR.ROWS key row [row ...]", min: 3, firstKey: 1, lastKey: 1, run: (*conn).getRows},
	"TENSOR.HASH": {usage: "TENSOR.HASH key", min: 2, max: 2, firstKey: 1, lastKey: 1, run: (*conn).hash},
	"TENSOR.COPY": {usage: "TENSOR.COPY destination source", min: 3, max: 3, access: All, firstKey: 1, lastKey: 2, run: (*conn).copy},

	"TENSOR.ACCUMULATOR": {usage: "TENSOR.ACCUMULATOR key length minibatches window", min: 5, max: 5, access: All, firstKey: 1, lastKey: 1, run: (*conn).accumulator},
	"TENSOR.ACCUMULATE":  {usage: "TENSOR.ACCUMULATE key minibatch bytes", min: 4, max: 4, access: Function, payload: true, firstKey: 1, lastKey: 1, run: (*conn).accumulate},
	"TENSOR.SKIP":        {usage: "TENSOR.SKIP key minibatch", min: 3, max: 3, access: All, firstKey: 1, lastKey: 1, run: (*conn).skip},
	"TENSOR.AVERAGE":     {usage: "TENSOR.AVERAGE destination key", min: 3, max: 3, access: All, firstKey: 1, lastKey: 2, run: (*conn).average},
	"TENSOR.MEAN":        {usage: "TENSOR.MEAN destination key [key ...]", min: 3, access: All, firstKey: 1, lastKey: -1, run: (*conn).mean},
	"TENSOR.WMEAN":       {usage: "TENSOR.WMEAN destination weight key [weight key ...]", min: 4, access: All, firstKey: 1, lastKey: -1, pairs: true, run: (*conn).weightedMean},
	"TENSOR.UPDATE": {usage: "TENSOR.UPDATE parameters state gradient STEP n SGD lr momentum weightdecay | ADAM lr beta1 beta2 eps weightdecay",
		min: 10, max: 12, access: All, firstKey: 1, lastKey: 3, run: (*conn).update},
}

// longestName bounds the copy that findCommand makes.
const longestName = 32

func findCommand(name []byte) (string, *command) {
	if len(name) > longestName {
		return string(name[:longestName]), nil
	}
	upper := strings.ToUpper(string(name))
	return upper, commands[upper]
}

// checkKeys refuses keys that the token's prefix does not cover.
func (c *conn) checkKeys(spec *command) error {
	if spec.firstKey == 0 {
		return nil
	}
	last := spec.lastKey
	if last < 0 {
		last = len(c.args) - 1
	}
	step := 1
	if spec.pairs {
		step = 2
	}
	for i := spec.firstKey; i <= last; i += step {
		key := c.args[i]
		if !bytes.HasPrefix(key, []byte(c.token.Prefix)) {
			return refuse("NOPERM", "this token may not use key %.80q", key)
		}
	}
	return nil
}

func (c *conn) ok() error {
	c.out = resp.AppendSimple(c.out, "OK")
	return nil
}

func (c *conn) auth(args [][]byte) error {
	secret := args[len(args)-1]
	token, grant := c.server.authenticate(secret), (*signedGrant)(nil)
	if token == nil {
		grant = c.server.openGrant(string(secret))
	}
	if token == nil && grant == nil {
		c.authErrors++
		c.quit = c.authErrors >= maxAuthErrors
		c.server.count(func(t *ServerStats) { t.WrongTokens++ })
		c.server.config.Logger.Warn("the database refuses a wrong token", "remote", c.nc.RemoteAddr().String())
		return refuse("WRONGPASS", "no such token")
	}
	shown := sha256.Sum256(secret)
	if !c.server.hold(shown, c.shown) {
		return refuse("ERR", "too many connections with this token")
	}
	c.token, c.grant, c.shown = token, grant, shown
	c.r.SetLimits(resp.Limits{MaxArgs: maxArgs, MaxBulk: c.server.config.MaxBulk})
	return c.ok()
}

func (c *conn) hello(args [][]byte) error {
	if len(args) > 0 && string(args[0]) != "2" {
		return refuse("NOPROTO", "RESP version 2 is the one spoken here")
	}
	if len(args) > 1 {
		if len(args) != 4 || !strings.EqualFold(string(args[1]), "AUTH") {
			return refuse("ERR", "use %s", c.spec.usage)
		}
		at := len(c.out)
		if err := c.auth(args[3:]); err != nil {
			return err
		}
		c.out = c.out[:at] // HELLO answers for both
	}
	if !c.known() {
		return refuse("NOAUTH", "send AUTH with the token first, or HELLO 2 AUTH user token")
	}
	c.out = resp.AppendArray(c.out, 6)
	c.out = resp.AppendBulkString(c.out, "server")
	c.out = resp.AppendBulkString(c.out, "spirt")
	c.out = resp.AppendBulkString(c.out, "proto")
	c.out = resp.AppendInt(c.out, 2)
	c.out = resp.AppendBulkString(c.out, "mode")
	c.out = resp.AppendBulkString(c.out, "standalone")
	return nil
}

func (c *conn) bye([][]byte) error {
	c.quit = true
	return c.ok()
}

func (c *conn) ping(args [][]byte) error {
	if len(args) == 1 {
		c.out = resp.AppendBulk(c.out, args[0])
		return nil
	}
	c.out = resp.AppendSimple(c.out, "PONG")
	return nil
}

func (c *conn) info([][]byte) error {
	stats := c.db.Stats()
	server := c.server.Stats()
	c.out = resp.AppendBulkString(c.out, fmt.Sprintf(
		"# Server\r\nserver:spirt\r\nconnected_clients:%d\r\nrejected_connections:%d\r\nwrong_tokens:%d\r\nnot_allowed:%d\r\nmalformed:%d\r\ntimed_out:%d\r\n# Memory\r\nused_memory:%d\r\nfree_memory:%d\r\nmaxmemory:%d\r\n# Keyspace\r\ntensors:%d\r\naccumulators:%d\r\nversion_counter:%d\r\n",
		server.Connections, server.TooMany, server.WrongTokens, server.NotAllowed, server.Malformed, server.TimedOut, stats.MemoryUsed, stats.MemoryFree, stats.MemoryLimit, stats.Keys, stats.Accumulators, stats.LastVersion))
	return nil
}

func (c *conn) exists(args [][]byte) error {
	n := 0
	for _, key := range args {
		if c.db.Exists(string(key)) {
			n++
		}
	}
	c.out = resp.AppendInt(c.out, int64(n))
	return nil
}

func (c *conn) keys(args [][]byte) error {
	prefix, ok := strings.CutSuffix(string(args[0]), "*")
	if !ok || strings.ContainsAny(prefix, "*?[\\") {
		return refuse("ERR", "a pattern is a prefix and one *, not %.80q", args[0])
	}
	keys := c.db.Keys(prefix)
	keys = slices.DeleteFunc(keys, func(key string) bool { return !strings.HasPrefix(key, c.token.Prefix) })
	c.out = resp.AppendArray(c.out, len(keys))
	for _, key := range keys {
		c.out = resp.AppendBulkString(c.out, key)
	}
	return nil
}

func (c *conn) del(args [][]byte) error {
	keys := make([]string, len(args))
	for i, key := range args {
		keys[i] = string(key)
	}
	c.out = resp.AppendInt(c.out, int64(c.db.Delete(keys...)))
	return nil
}

// set reads the tensor from the socket into the memory where it stays.
func (c *conn) set(args [][]byte) error {
	key := string(args[0])
	if err := checkKey(key); err != nil {
		return err
	}
	dtype, err := tensor.ParseDType(string(args[1]))
	if err != nil {
		return refuse("WRONGTYPE", "%v", err)
	}
	rank, err := c.number("rank", args[2], 0, tensor.MaxRank)
	if err != nil {
		return err
	}
	if len(args) != 3+rank {
		return refuse("ERR", "rank %d, but %d dimensions", rank, len(args)-3)
	}
	shape := make([]int, rank)
	for i := range shape {
		if shape[i], err = c.number("dimension", args[3+i], 0, math.MaxInt); err != nil {
			return err
		}
	}
	want, err := tensor.DataLen(dtype, shape)
	if err != nil {
		return refuse("TOOLARGE", "%v", err)
	}
	size, err := c.payload()
	if err != nil {
		return err
	}
	if size != want {
		return c.refusePayload(size, refuse("WRONGTYPE", "a %v tensor of shape %v has %d bytes, not %d", dtype, shape, want, size))
	}
	b, err := c.db.mem.alloc(size)
	if err != nil {
		return c.refusePayload(size, fmt.Errorf("setting %q: %w", key, err))
	}
	if err := c.readPayload(b.data, nil); err != nil {
		b.release()
		return err
	}
	number, err := c.db.put(key, &version{blob: b, dtype: dtype, shape: shape})
	if err != nil {
		return err
	}
	c.out = resp.AppendInt(c.out, int64(number))
	return nil
}

// payload reads the header of the tensor's bytes that end the command.
func (c *conn) payload() (int, error) {
	size, err := c.r.Bulk()
	if err != nil {
		return 0, err
	}
	c.unread--
	return size, nil
}

// refusePayload reads over the tensor's bytes and returns the reason, so that
// the connection can be used further.
func (c *conn) refusePayload(size int, reason error) error {
	if err := c.r.Discard(size); err != nil {
		return err
	}
	if err := c.r.EndBulk(); err != nil {
		return err
	}
	return reason
}

// readPayload reads the tensor's bytes to the end of the command. check, if
// there is one, sees each part as it comes, in whole floats.
func (c *conn) readPayload(data []byte, check func(part []byte, offset int)) error {
	if check == nil {
		if err := c.r.ReadFull(data); err != nil {
			return err
		}
		return c.r.EndBulk()
	}
	for at, checked := 0, 0; at < len(data); {
		n, err := c.r.ReadSome(data[at:])
		if err != nil {
			return err
		}
		at += n
		whole := at &^ 3
		check(data[checked:whole], checked)
		checked = whole
	}
	return c.r.EndBulk()
}

func (c *conn) get(args [][]byte) error {
	ref, err := c.db.Get(string(args[0]))
	if err != nil {
		return err
	}
	defer ref.Release()
	if len(args) > 1 {
		if len(args) != 3 || !strings.EqualFold(string(args[1]), "IFNOT") {
			return refuse("ERR", "use %s", c.spec.usage)
		}
		have, err := strconv.ParseUint(string(args[2]), 10, 64)
		if err != nil {
			return refuse("ERR", "version %.32q is not a number", args[2])
		}
		if have == ref.Version() {
			c.out = resp.AppendNil(c.out)
			return nil
		}
	}
	t := ref.Tensor()
	if int64(len(t.Data)) > c.server.config.MaxBulk {
		return refuse("TOOLARGE", "%q has %d bytes, replies have at most %d", args[0], len(t.Data), c.server.config.MaxBulk)
	}
	c.out = resp.AppendArray(c.out, 4)
	c.out = resp.AppendBulkString(c.out, t.DType.String())
	c.out = resp.AppendArray(c.out, len(t.Shape))
	for _, d := range t.Shape {
		c.out = resp.AppendInt(c.out, int64(d))
	}
	c.out = resp.AppendInt(c.out, int64(ref.Version()))
	return c.bulk(t.Data)
}

// bulk answers with data, which is written from where it lies if it is large.
func (c *conn) bulk(data []byte) error {
	if len(data) < flushAt {
		c.out = resp.AppendBulk(c.out, data)
		return nil
	}
	c.out = resp.AppendBulkHeader(c.out, len(data))
	if err := c.flushWith(data); err != nil {
		return err
	}
	c.out = append(c.out, "\r\n"...)
	return nil
}

func (c *conn) getRows(args [][]byte) error {
	c.indices = c.indices[:0]
	for _, arg := range args[1:] {
		row, err := c.number("row", arg, 0, math.MaxInt)
		if err != nil {
			return err
		}
		c.indices = append(c.indices, row)
	}
	key := string(args[0])
	ref, err := c.db.Get(key)
	if err != nil {
		return err
	}
	size, err := rowSize(key, ref.Tensor())
	ref.Release()
	if err != nil {
		return err
	}
	if int64(len(c.indices)) > c.server.config.MaxBulk/int64(max(size, 1)) {
		return refuse("TOOLARGE", "%d rows of %d bytes, replies have at most %d bytes", len(c.indices), size, c.server.config.MaxBulk)
	}
	rows, err := c.db.Rows(c.rows[:0], key, c.indices)
	if err != nil {
		return err
	}
	if cap(rows) <= pieceSize {
		c.rows = rows // larger memory is not kept
	}
	return c.bulk(rows)
}

func (c *conn) hash(args [][]byte) error {
	h, err := c.db.Hash(string(args[0]))
	if err != nil {
		return err
	}
	c.out = resp.AppendBulkString(c.out, h.String())
	return nil
}

func (c *conn) copy(args [][]byte) error {
	if err := c.db.Copy(string(args[0]), string(args[1])); err != nil {
		return err
	}
	return c.ok()
}

func (c *conn) accumulator(args [][]byte) error {
	var numbers [3]int
	for i, what := range []string{"length", "minibatches", "window"} {
		var err error
		if numbers[i], err = c.number(what, args[1+i], 0, math.MaxInt32); err != nil {
			return err
		}
	}
	if err := c.db.Accumulator(string(args[0]), numbers[0], numbers[1], numbers[2]); err != nil {
		return err
	}
	return c.ok()
}

// accumulate reads the gradient from the socket into the memory that is
// summed, and looks for numbers that are not finite while they are in the
// cache.
func (c *conn) accumulate(args [][]byte) error {
	minibatch, err := c.number("minibatch", args[1], 0, maxMinibatches)
	if err != nil {
		return err
	}
	a, err := c.db.accumulator(string(args[0]))
	if err != nil {
		return err
	}
	size, err := c.payload()
	if err != nil {
		return err
	}
	duplicate, err := a.check(minibatch, size)
	if err != nil {
		return c.refusePayload(size, err)
	}
	if duplicate {
		if err := c.refusePayload(size, nil); err != nil {
			return err
		}
		return c.status(Duplicate)
	}
	b, err := c.db.mem.alloc(size)
	if err != nil {
		return c.refusePayload(size, fmt.Errorf("accumulating minibatch %d in %q: %w", minibatch, a.key, err))
	}
	var refused error
	err = c.readPayload(b.data, func(part []byte, offset int) {
		f := tensor.Floats(part)
		if i := kernel.FirstNonFinite(f); i >= 0 && refused == nil {
			refused = a.notFinite(minibatch, offset/4+i, f[i])
		}
	})
	if err == nil {
		err = refused
	}
	if err != nil {
		b.release()
		return err
	}
	status, err := a.put(minibatch, b)
	if err != nil {
		return err
	}
	return c.status(status)
}

func (c *conn) status(s Status) error {
	c.out = resp.AppendSimple(c.out, strings.ToUpper(s.String()))
	return nil
}

func (c *conn) skip(args [][]byte) error {
	minibatch, err := c.number("minibatch", args[1], 0, maxMinibatches)
	if err != nil {
		return err
	}
	if err := c.db.Skip(string(args[0]), minibatch); err != nil {
		return err
	}
	return c.ok()
}

func (c *conn) average(args [][]byte) error {
	counted, err := c.db.Average(string(args[0]), string(args[1]))
	if err != nil {
		return err
	}
	c.out = resp.AppendInt(c.out, int64(counted))
	return nil
}

func (c *conn) mean(args [][]byte) error {
	keys := make([]string, len(args)-1)
	for i, key := range args[1:] {
		keys[i] = string(key)
	}
	if err := c.db.Mean(string(args[0]), keys, nil); err != nil {
		return err
	}
	return c.ok()
}

func (c *conn) weightedMean(args [][]byte) error {
	if len(args)%2 == 0 {
		return refuse("ERR", "use %s", c.spec.usage)
	}
	var keys []string
	var weights []uint32
	for i := 1; i < len(args); i += 2 {
		w, err := c.number("weight", args[i], 1, maxWeight)
		if err != nil {
			return err
		}
		keys, weights = append(keys, string(args[i+1])), append(weights, uint32(w))
	}
	if err := c.db.Mean(string(args[0]), keys, weights); err != nil {
		return err
	}
	return c.ok()
}

func (c *conn) update(args [][]byte) error {
	usage := refuse("ERR", "use %s", c.spec.usage)
	if !strings.EqualFold(string(args[3]), "STEP") {
		return usage
	}
	step, err := strconv.ParseUint(string(args[4]), 10, 63)
	if err != nil {
		return refuse("ERR", "step %.32q is not a number", args[4])
	}
	config := optim.Config{Name: strings.ToLower(string(args[5]))}
	var fields []*float32
	switch config.Name {
	case optim.SGD:
		fields = []*float32{&config.LR, &config.Momentum, &config.WeightDecay}
	case optim.Adam:
		fields = []*float32{&config.LR, &config.Beta1, &config.Beta2, &config.Eps, &config.WeightDecay}
	default:
		return usage
	}
	if len(args) != 6+len(fields) {
		return usage
	}
	for i, f := range fields {
		x, err := strconv.ParseFloat(string(args[6+i]), 32)
		if err != nil {
			return refuse("ERR", "hyperparameter %.32q is not a number", args[6+i])
		}
		*f = float32(x)
	}
	applied, err := c.db.Update(string(args[0]), string(args[1]), string(args[2]), step, config)
	if err != nil {
		return err
	}
	n := int64(0)
	if applied {
		n = 1
	}
	c.out = resp.AppendInt(c.out, n)
	return nil
}

// number reads a decimal argument.
func (c *conn) number(what string, arg []byte, lo, hi int) (int, error) {
	n, err := strconv.Atoi(string(arg))
	if err != nil {
		return 0, refuse("ERR", "%s %.32q is not a number", what, arg)
	}
	if n < lo || n > hi {
		return 0, refuse("OUTOFRANGE", "%s %d is not in [%d, %d]", what, n, lo, hi)
	}
	return n, nil
}

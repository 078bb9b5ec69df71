package tensordb

import (
	"bytes"
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/redis/go-redis/v9"

	"github.com/spirt-ml/spirt/resp"
	"github.com/spirt-ml/spirt/tensor"
)

const (
	testPrefix = "{job:0}:"
	adminToken = "secret-of-all"
	funcToken  = "secret-of-functions"
	readToken  = "secret-of-readers"
)

// startServer serves a new database on a Unix socket until the test ends.
func startServer(t testing.TB, config Config, serverConfig ServerConfig) (db *DB, socket string) {
	t.Helper()
	db, _, socket = startTheServer(t, config, serverConfig)
	return db, socket
}

func startTheServer(t testing.TB, config Config, serverConfig ServerConfig) (db *DB, s *Server, socket string) {
	t.Helper()
	db, err := Open(config)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "spirt") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket = filepath.Join(dir, "db.sock")
	ln, err := ListenUnix(socket)
	if err != nil {
		t.Fatal(err)
	}
	serverConfig.Tokens = []Token{
		{Secret: adminToken, Access: All},
		{Secret: funcToken, Prefix: testPrefix, Access: Function},
		{Secret: readToken, Prefix: testPrefix, Access: ReadOnly},
	}
	s = NewServer(db, serverConfig)
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		db.Close()
	})
	return db, s, socket
}

func dial(t testing.TB, socket, token string) *resp.Conn {
	t.Helper()
	c, err := resp.Dial(t.Context(), "unix", socket, resp.DialOptions{Token: token})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func do(t testing.TB, c *resp.Conn, args ...any) resp.Reply {
	t.Helper()
	r, err := c.Do(t.Context(), args...)
	if err != nil {
		t.Fatalf("%v: %v", args[0], err)
	}
	return r
}

// wantCode sends a command and expects an error reply with this code.
func wantCode(t testing.TB, c *resp.Conn, code string, args ...any) {
	t.Helper()
	_, err := c.Do(t.Context(), args...)
	var e *resp.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Fatalf("%.100v: %v, want %s", args, err, code)
	}
}

func numbers(n int, f func(i int) float32) []float32 {
	v := make([]float32, n)
	for i := range v {
		v[i] = f(i)
	}
	return v
}

func TestCommands(t *testing.T) {
	_, socket := startServer(t, Config{}, ServerConfig{})
	c := dial(t, socket, adminToken)
	p := testPrefix + "parameters"

	if r := do(t, c, "PING"); string(r.Bytes) != "PONG" {
		t.Fatalf("PING: %q", r.Bytes)
	}
	params := numbers(6, func(i int) float32 { return float32(i) })
	v1 := do(t, c, "TENSOR.SET", p, "float32", 2, 2, 3, tensor.Bytes(params)).Int
	r := do(t, c, "TENSOR.GET", p)
	if string(r.Elems[0].Bytes) != "float32" || r.Elems[1].Elems[1].Int != 3 || r.Elems[2].Int != v1 || !bytes.Equal(r.Elems[3].Bytes, tensor.Bytes(params)) {
		t.Fatalf("TENSOR.GET: %+v", r)
	}
	if r := do(t, c, "TENSOR.GET", p, "IFNOT", v1); r.Kind != resp.Nil {
		t.Fatalf("TENSOR.GET IFNOT: %+v", r)
	}
	if r := do(t, c, "TENSOR.GET", p, "IFNOT", v1-1); r.Kind != resp.Array {
		t.Fatalf("TENSOR.GET IFNOT another: %+v", r)
	}
	if r := do(t, c, "TENSOR.ROWS", p, 1, 0, 1); !slices.Equal(tensor.Floats(r.Bytes), []float32{3, 4, 5, 0, 1, 2, 3, 4, 5}) {
		t.Fatalf("TENSOR.ROWS: %v", r.Bytes)
	}
	wantCode(t, c, "OUTOFRANGE", "TENSOR.ROWS", p, 2)

	acc := testPrefix + "gradients:1"
	do(t, c, "TENSOR.ACCUMULATOR", acc, 6, 4, 2)
	g := func(x float32) []byte { return tensor.Bytes(numbers(6, func(int) float32 { return x })) }
	for _, step := range []struct {
		minibatch int
		status    string
	}{{1, "BUFFERED"}, {0, "COUNTED"}, {1, "DUPLICATE"}} {
		if r := do(t, c, "TENSOR.ACCUMULATE", acc, step.minibatch, g(float32(step.minibatch+1))); string(r.Bytes) != step.status {
			t.Fatalf("minibatch %d: %s, want %s", step.minibatch, r.Bytes, step.status)
		}
	}
	bad := g(1)
	tensor.Floats(bad)[4] = float32(math.NaN())
	wantCode(t, c, "NOTFINITE", "TENSOR.ACCUMULATE", acc, 2, bad)
	wantCode(t, c, "INCOMPLETE", "TENSOR.AVERAGE", testPrefix+"average", acc)
	do(t, c, "TENSOR.ACCUMULATE", acc, 2, g(6))
	do(t, c, "TENSOR.SKIP", acc, 3)
	wantCode(t, c, "OUTOFRANGE", "TENSOR.ACCUMULATE", acc, 3, g(1))
	if r := do(t, c, "TENSOR.AVERAGE", testPrefix+"average", acc); r.Int != 3 {
		t.Fatalf("TENSOR.AVERAGE: %d", r.Int)
	}
	if r := do(t, c, "TENSOR.GET", testPrefix+"average"); tensor.Floats(r.Elems[3].Bytes)[5] != 3 {
		t.Fatalf("average %v", tensor.Floats(r.Elems[3].Bytes))
	}

	do(t, c, "TENSOR.COPY", testPrefix+"two", testPrefix+"average")
	do(t, c, "TENSOR.MEAN", testPrefix+"mean", testPrefix+"two", testPrefix+"average")
	if a, b := do(t, c, "TENSOR.HASH", testPrefix+"mean").Bytes, do(t, c, "TENSOR.HASH", testPrefix+"two").Bytes; len(a) != 64 || len(b) != 64 {
		t.Fatalf("hashes %q, %q", a, b)
	}
	do(t, c, "TENSOR.SET", testPrefix+"half", "float16", 1, 3, []byte{0, 0x3c, 0, 0x40, 0, 0xc0}) // 1, 2, -2
	do(t, c, "TENSOR.SET", testPrefix+"one", "float16", 1, 3, []byte{0, 0x3c, 0, 0x3c, 0, 0x3c})
	do(t, c, "TENSOR.WMEAN", testPrefix+"half", 3, testPrefix+"half", 1, testPrefix+"one")
	if r := do(t, c, "TENSOR.GET", testPrefix+"half"); string(r.Elems[0].Bytes) != "float32" || !slices.Equal(tensor.Floats(r.Elems[3].Bytes), []float32{1, 1.75, -1.25}) {
		t.Fatalf("TENSOR.WMEAN: %s %v", r.Elems[0].Bytes, tensor.Floats(r.Elems[3].Bytes))
	}
	wantCode(t, c, "ERR", "TENSOR.WMEAN", testPrefix+"half", 3, testPrefix+"half", 1)
	wantCode(t, c, "OUTOFRANGE", "TENSOR.WMEAN", testPrefix+"half", 0, testPrefix+"half")
	wantCode(t, c, "WRONGTYPE", "TENSOR.WMEAN", testPrefix+"half", 1, testPrefix+"half", 1, testPrefix+"one")
	do(t, c, "DEL", testPrefix+"half", testPrefix+"one")
	update := []any{"TENSOR.UPDATE", p, testPrefix + "state", testPrefix + "mean", "STEP", 1, "SGD", "LR", 0.5}
	if r := do(t, c, update...); r.Int != 1 {
		t.Fatalf("first update: %d", r.Int)
	}
	if r := do(t, c, update...); r.Int != 0 {
		t.Fatalf("second update: %d", r.Int)
	}
	wantCode(t, c, "WRONGTYPE", "TENSOR.UPDATE", p, testPrefix+"state", testPrefix+"mean", "STEP", 2, "ADAM", "LR", 0.5)
	wantCode(t, c, "OUTOFRANGE", "TENSOR.UPDATE", p, testPrefix+"state", testPrefix+"mean", "STEP", 3, "SGD", "LR", 0.5)
	wantCode(t, c, "ERR", "TENSOR.UPDATE", p, testPrefix+"state", testPrefix+"mean", "STEP", 2, "ADAM", 0.5)
	if r := do(t, c, "TENSOR.GET", p); tensor.Floats(r.Elems[3].Bytes)[0] != -1.5 {
		t.Fatalf("updated %v", tensor.Floats(r.Elems[3].Bytes))
	}
	if r := do(t, c, "KEYS", testPrefix+"*"); len(r.Elems) != 5 {
		t.Fatalf("KEYS: %d", len(r.Elems))
	}
	if r := do(t, c, "EXISTS", p, "other"); r.Int != 1 {
		t.Fatalf("EXISTS: %d", r.Int)
	}
	if r := do(t, c, "DEL", p, "other", acc); r.Int != 2 {
		t.Fatalf("DEL: %d", r.Int)
	}
	wantCode(t, c, "NOKEY", "TENSOR.GET", p)
	wantCode(t, c, "NOKEY", "TENSOR.ACCUMULATE", acc, 0, g(1))
	if r := do(t, c, "INFO"); !strings.Contains(string(r.Bytes), "tensors:4") {
		t.Fatalf("INFO: %s", r.Bytes)
	}
	if r := do(t, c, "QUIT"); string(r.Bytes) != "OK" {
		t.Fatalf("QUIT: %q", r.Bytes)
	}
}

func TestRedisClient(t *testing.T) {
	_, socket := startServer(t, Config{}, ServerConfig{})
	client := redis.NewClient(&redis.Options{Network: "unix", Addr: socket, Password: adminToken})
	defer client.Close()
	ctx := t.Context()
	if err := client.Ping(ctx).Err(); err != nil {
		t.Fatal(err)
	}
	const peers, minibatches, length = 4, 8, 1000
	acc := testPrefix + "gradients"
	if err := client.Do(ctx, "TENSOR.ACCUMULATOR", acc, length, minibatches, minibatches).Err(); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	statuses := map[string]int{}
	for range peers { // every minibatch is sent by each, in another order
		wg.Go(func() {
			for i := range minibatches {
				m := (i*3 + 5) % minibatches
				g := numbers(length, func(int) float32 { return float32(m) })
				s, err := client.Do(ctx, "TENSOR.ACCUMULATE", acc, m, tensor.Bytes(g)).Text()
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				statuses[s]++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if statuses["DUPLICATE"] != (peers-1)*minibatches || statuses["COUNTED"]+statuses["BUFFERED"] != minibatches {
		t.Fatalf("statuses %v", statuses)
	}
	if n, err := client.Do(ctx, "TENSOR.AVERAGE", testPrefix+"average", acc).Int(); err != nil || n != minibatches {
		t.Fatalf("average of %d, %v", n, err)
	}
	reply, err := client.Do(ctx, "TENSOR.GET", testPrefix+"average").Slice()
	if err != nil {
		t.Fatal(err)
	}
	data := []byte(reply[3].(string))
	if got := tensor.Floats(data)[length-1]; got != 3.5 {
		t.Fatalf("average %v", got)
	}
	if keys, err := client.Keys(ctx, testPrefix+"*").Result(); err != nil || len(keys) != 1 {
		t.Fatalf("keys %v, %v", keys, err)
	}
	if err := client.Do(ctx, "TENSOR.GET", "none").Err(); err == nil || !strings.HasPrefix(err.Error(), "NOKEY") {
		t.Fatalf("missing key: %v", err)
	}
	wrong := redis.NewClient(&redis.Options{Network: "unix", Addr: socket, Password: "wrong", MaxRetries: -1})
	defer wrong.Close()
	if err := wrong.Ping(ctx).Err(); err == nil || !strings.HasPrefix(err.Error(), "WRONGPASS") {
		t.Fatalf("wrong token: %v", err)
	}
}

// Several commands in one piece: all are run, the answers come in order and
// stay valid together, and one that is refused refuses the whole.
func TestDoAll(t *testing.T) {
	db, socket := startServer(t, Config{}, ServerConfig{})
	big := make([]byte, 300_000)
	for i := range big {
		big[i] = byte(i * 7)
	}
	if _, err := db.Set("{j:1}:big", tensor.Tensor{DType: tensor.Uint8, Shape: []int{300, 1000}, Data: big}); err != nil {
		t.Fatal(err)
	}
	c := dial(t, socket, adminToken)
	dst := make([]byte, len(big))
	rows := resp.Command{Args: []any{"TENSOR.ROWS", "{j:1}:big", 299, 0}}
	replies, err := c.DoAll(t.Context(), rows, resp.Command{Args: []any{"TENSOR.GET", "{j:1}:big"}, Dst: dst}, resp.Command{Args: []any{"PING"}})
	if err != nil {
		t.Fatal(err)
	}
	if got := replies[0].Bytes; !bytes.Equal(got[:1000], big[299_000:]) || !bytes.Equal(got[1000:], big[:1000]) {
		t.Error("the rows are not those asked for")
	}
	if !bytes.Equal(dst, big) || string(replies[2].Bytes) != "PONG" {
		t.Errorf("the tensor or the answer to PING (%q) is wrong", replies[2].Bytes)
	}
	var refused *resp.Error
	if _, err := c.DoAll(t.Context(), resp.Command{Args: []any{"TENSOR.GET", "{j:1}:none"}}, rows); !errors.As(err, &refused) || refused.Code != "NOKEY" {
		t.Errorf("error %v, want NOKEY", err)
	}
	if _, err := c.Do(t.Context(), "PING"); err != nil {
		t.Errorf("after a refused command: %v", err)
	}
}

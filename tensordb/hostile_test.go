package tensordb

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/resp"
	"github.com/spirt-ml/spirt/tensor"
)

// raw opens a connection that can send anything.
func raw(t testing.TB, socket string) net.Conn {
	t.Helper()
	nc, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(20 * time.Second)) // a hang fails the test
	return nc
}

const rawAuth = "*2\r\n$4\r\nAUTH\r\n$13\r\n" + adminToken + "\r\n"

// answers sends bytes and returns all that comes back until the server closes.
func answers(t testing.TB, socket, send string) string {
	t.Helper()
	nc := raw(t, socket)
	go io.WriteString(nc, send) // the server may close before all is sent
	all, err := io.ReadAll(nc)
	if err != nil && !strings.Contains(err.Error(), "reset") {
		t.Fatalf("%.60q: %v after %q", send, err, all)
	}
	return string(all)
}

// TestHostileBytes sends what no good program sends. Each connection ends with
// an error that says why, and the database answers others as before.
func TestHostileBytes(t *testing.T) {
	db, socket := startServer(t, Config{}, ServerConfig{MaxBulk: 1 << 20})
	good := dial(t, socket, adminToken)
	key := testPrefix + "x"
	do(t, good, "TENSOR.SET", key, "uint8", 1, 3, "abc")
	before := db.Stats()
	many := strings.Repeat("$1\r\nx\r\n", 4)
	for send, want := range map[string]string{
		"GET / HTTP/1.1\r\n\r\n":           "-ERR protocol error",
		"\x16\x03\x01\x02\x00\x01\x00\r\n": "-ERR protocol error",
		strings.Repeat("A", 1<<20):         "-ERR protocol error",
		"*1000000\r\n":                     "-ERR protocol error",
		"*17\r\n":                          "-ERR protocol error",
		"*2\r\n$4\r\nAUTH\r\n$5000\r\n":    "-TOOLARGE",
		rawAuth + "*2\r\n$10\r\nTENSOR.GET\r\n$2147483648\r\n":                                                              "+OK\r\n-TOOLARGE",
		rawAuth + "*2\r\n$10\r\nTENSOR.GET\r\n$100000\r\n":                                                                  "+OK\r\n-TOOLARGE",
		rawAuth + "*6\r\n$10\r\nTENSOR.SET\r\n$1\r\nk\r\n$5\r\nuint8\r\n$1\r\n1\r\n$10\r\n2147483648\r\n$2147483648\r\nabc": "+OK\r\n-TOOLARGE",
		rawAuth + "*65537\r\n":                                                                                       "+OK\r\n-ERR protocol error",
		rawAuth + "*4\r\n" + many + "*1\r\n$4\r\nQUIT\r\n":                                                           "+OK\r\n-ERR unknown command \"X\"\r\n+OK\r\n",
		rawAuth + "*1\r\n$10\r\nTENSOR.GET\r\n*1\r\n$4\r\nQUIT\r\n":                                                  "+OK\r\n-ERR wrong number of arguments for TENSOR.GET",
		"*1\r\n$4\r\nPING\r\n*1\r\n$4\r\nQUIT\r\n":                                                                   "-NOAUTH",
		"*2\r\n$10\r\nTENSOR.GET\r\n$1\r\nx\r\n*1\r\n$4\r\nQUIT\r\n":                                                 "-NOAUTH",
		"*2\r\n$5\r\nHELLO\r\n$1\r\n4\r\n*1\r\n$4\r\nQUIT\r\n":                                                       "-NOPROTO",
		"*1\r\n$5\r\nHELLO\r\n*1\r\n$4\r\nQUIT\r\n":                                                                  "-NOAUTH",
		strings.Repeat("*2\r\n$4\r\nAUTH\r\n$1\r\nx\r\n", maxAuthErrors):                                             strings.Repeat("-WRONGPASS no such token\r\n", maxAuthErrors),
		"*2\r\n$4\r\nAUTH\r\n$0\r\n\r\n*1\r\n$4\r\nQUIT\r\n":                                                         "-WRONGPASS",
		"*5\r\n$5\r\nHELLO\r\n$1\r\n2\r\n$4\r\nAUTH\r\n$1\r\nu\r\n$13\r\n" + adminToken + "\r\n*1\r\n$4\r\nQUIT\r\n": "*14\r\n$6\r\nserver",
	} {
		if got := answers(t, socket, send); !strings.HasPrefix(got, want) {
			t.Errorf("%.80q: %.200q, want %q", send, got, want)
		}
	}
	if after := db.Stats(); after != before {
		t.Errorf("something changed: %+v, it was %+v", after, before)
	}
	if r := do(t, good, "TENSOR.GET", key); string(r.Elems[3].Bytes) != "abc" {
		t.Fatal("the database does not answer any more")
	}
}

// TestHalfACommand closes connections in the middle of a tensor: no memory and
// no half tensor stays.
func TestHalfACommand(t *testing.T) {
	db, socket := startServer(t, Config{}, ServerConfig{})
	acc := testPrefix + "acc"
	if err := db.Accumulator(acc, 1000, 2, 1); err != nil {
		t.Fatal(err)
	}
	header := rawAuth + fmt.Sprintf("*4\r\n$17\r\nTENSOR.ACCUMULATE\r\n$%d\r\n%s\r\n$1\r\n0\r\n$4000\r\n", len(acc), acc)
	whole := header + strings.Repeat("\x00", 4000) + "\r\n"
	for _, n := range []int{3, len(rawAuth) + 2, len(header) - 3, len(header), len(header) + 1234, len(whole) - 1} {
		nc := raw(t, socket)
		if _, err := io.WriteString(nc, whole[:n]); err != nil {
			t.Fatal(err)
		}
		nc.(*net.UnixConn).CloseWrite()
		io.Copy(io.Discard, nc) // until the server is done with it
		if s := db.Stats(); s.MemoryUsed != 0 {
			t.Fatalf("cut at %d: %+v", n, s)
		}
	}
	c := dial(t, socket, funcToken)
	if r := do(t, c, "TENSOR.ACCUMULATE", acc, 0, make([]byte, 4000)); string(r.Bytes) != "COUNTED" {
		t.Fatalf("after the cuts: %s", r.Bytes)
	}
}

// TestRefusedTensors sends tensors that cannot be taken: the connection stays
// usable, nothing changes.
func TestRefusedTensors(t *testing.T) {
	db, socket := startServer(t, Config{MaxMemory: 100_000}, ServerConfig{MaxBulk: 1 << 20})
	c := dial(t, socket, adminToken)
	acc := testPrefix + "acc"
	do(t, c, "TENSOR.ACCUMULATOR", acc, 10_000, 8, 1)
	before := db.Stats()
	data := make([]byte, 40_000)
	wantCode(t, c, "WRONGTYPE", "TENSOR.SET", "k", "float64", 1, 20_000, data)
	wantCode(t, c, "WRONGTYPE", "TENSOR.SET", "k", "float32", 1, 9_999, data)
	wantCode(t, c, "ERR", "TENSOR.SET", "k", "float32", 2, 10_000, data)
	wantCode(t, c, "ERR", "TENSOR.SET", "k", "float32", "one", 10_000, data)
	wantCode(t, c, "OUTOFRANGE", "TENSOR.SET", "k", "float32", 1, -1, data)
	wantCode(t, c, "OUTOFRANGE", "TENSOR.SET", "k", "float32", 9, 10_000, data)
	wantCode(t, c, "OUTOFRANGE", "TENSOR.SET", "", "float32", 1, 10_000, data)
	wantCode(t, c, "OUTOFRANGE", "TENSOR.SET", strings.Repeat("k", 513), "float32", 1, 10_000, data)
	wantCode(t, c, "TOOLARGE", "TENSOR.SET", "k", "float32", 3, math.MaxInt32, math.MaxInt32, math.MaxInt32, data)
	wantCode(t, c, "OOM", "TENSOR.SET", "k", "uint8", 1, 200_000, make([]byte, 200_000))
	wantCode(t, c, "NOKEY", "TENSOR.ACCUMULATE", "none", 0, data)
	wantCode(t, c, "OUTOFRANGE", "TENSOR.ACCUMULATE", acc, 8, data)
	wantCode(t, c, "OUTOFRANGE", "TENSOR.ACCUMULATE", acc, 2, data)
	wantCode(t, c, "OUTOFRANGE", "TENSOR.ACCUMULATE", acc, 0, data[4:])
	wantCode(t, c, "OUTOFRANGE", "TENSOR.ACCUMULATE", acc, 0, data[1:])
	wantCode(t, c, "OUTOFRANGE", "TENSOR.ACCUMULATE", acc, -1, data)
	wantCode(t, c, "ERR", "TENSOR.ACCUMULATE", acc, "0x1", data)
	bad := bytes.Clone(data)
	tensor.Floats(bad)[7] = float32(math.Inf(-1))
	tensor.Floats(bad)[9_999] = float32(math.NaN())
	wantCode(t, c, "NOTFINITE", "TENSOR.ACCUMULATE", acc, 0, bad)
	_, err := c.Do(t.Context(), "TENSOR.ACCUMULATE", acc, 0, bad)
	if err == nil || !strings.Contains(err.Error(), "minibatch 0") || !strings.Contains(err.Error(), "index 7;") {
		t.Errorf("it does not name minibatch and index: %v", err)
	}
	after := db.Stats()
	after.MemoryFree = before.MemoryFree
	if after != before {
		t.Errorf("something changed: %+v, it was %+v", after, before)
	}
	do(t, c, "TENSOR.ACCUMULATE", acc, 0, data)
	do(t, c, "TENSOR.ACCUMULATE", acc, 2, data)
	wantCode(t, c, "OOM", "TENSOR.SET", "k", "uint8", 1, 20_000, data[:20_000])
}

func TestTokens(t *testing.T) {
	db, socket := startServer(t, Config{}, ServerConfig{})
	own, foreign := testPrefix+"p", "{job:1}:p"
	for _, key := range []string{own, foreign} {
		set(t, db, key, constant(4, 1))
		db.Accumulator(key, 4, 1, 0)
	}
	g := make([]byte, 16)
	all := dial(t, socket, adminToken)
	function, reader := dial(t, socket, funcToken), dial(t, socket, readToken)
	for _, c := range []*resp.Conn{function, reader} {
		do(t, c, "TENSOR.GET", own)
		do(t, c, "TENSOR.ROWS", own, 0)
		do(t, c, "TENSOR.HASH", own)
		wantCode(t, c, "NOPERM", "TENSOR.GET", foreign)
		wantCode(t, c, "NOPERM", "TENSOR.ROWS", foreign, 0)
		wantCode(t, c, "NOPERM", "TENSOR.HASH", foreign)
		wantCode(t, c, "NOPERM", "EXISTS", own, foreign)
		wantCode(t, c, "NOPERM", "TENSOR.ACCUMULATE", foreign, 0, g)
		wantCode(t, c, "NOPERM", "TENSOR.SET", own, "float32", 1, 4, g)
		wantCode(t, c, "NOPERM", "TENSOR.ACCUMULATOR", own, 4, 1, 0)
		wantCode(t, c, "NOPERM", "TENSOR.SKIP", own, 0)
		wantCode(t, c, "NOPERM", "TENSOR.AVERAGE", own, own)
		wantCode(t, c, "NOPERM", "TENSOR.MEAN", own, own)
		wantCode(t, c, "NOPERM", "TENSOR.WMEAN", own, 1, own)
		wantCode(t, c, "NOPERM", "TENSOR.UPDATE", own, own, own, "STEP", 1, "SGD", "LR", 1)
		wantCode(t, c, "NOPERM", "TENSOR.COPY", own, own)
		wantCode(t, c, "NOPERM", "DEL", own)
		if r := do(t, c, "KEYS", "*"); len(r.Elems) != 1 {
			t.Errorf("keys of another prefix are listed: %d", len(r.Elems))
		}
	}
	wantCode(t, reader, "NOPERM", "TENSOR.ACCUMULATE", own, 0, g)
	do(t, function, "TENSOR.ACCUMULATE", own, 0, g)
	do(t, all, "TENSOR.MEAN", foreign, own, foreign)
	if _, err := resp.Dial(t.Context(), "unix", socket, resp.DialOptions{Token: "guess"}); err == nil || !strings.Contains(err.Error(), "WRONGPASS") {
		t.Errorf("a wrong token: %v", err)
	}
	wantCode(t, dial(t, socket, ""), "NOAUTH", "TENSOR.GET", own)
	if mode, err := os.Stat(socket); err != nil || mode.Mode().Perm() != 0o600 {
		t.Errorf("the socket's mode is %v, %v", mode.Mode(), err)
	}
}

// TestSlowAndIdle: who does not read, does not go on or says nothing is cut
// off, and holds no memory after that.
func TestSlowAndIdle(t *testing.T) {
	db, socket := startServer(t, Config{}, ServerConfig{IdleTimeout: 30 * time.Millisecond, TransferTimeout: 30 * time.Millisecond})
	set(t, db, "big", constant(4<<20, 1))
	for name, send := range map[string]string{
		"idle":             "",
		"half a header":    "*2\r\n$4\r\nAU",
		"half a command":   rawAuth + "*2\r\n$10\r\nTENSOR.GET\r\n",
		"never reads":      rawAuth + strings.Repeat("*2\r\n$10\r\nTENSOR.GET\r\n$3\r\nbig\r\n", 3),
		"idle after a GET": rawAuth + "*2\r\n$6\r\nEXISTS\r\n$3\r\nbig\r\n",
	} {
		nc := raw(t, socket)
		io.WriteString(nc, send) // on a busy machine it is cut off already
		if name == "never reads" {
			continue // the server's Close, which waits, tells if it is stuck
		}
		if _, err := io.Copy(io.Discard, nc); err != nil && !strings.Contains(err.Error(), "reset") {
			t.Errorf("%s: the connection is not closed: %v", name, err)
		}
	}
	db.Delete("big")
}

func TestTooManyConnections(t *testing.T) {
	_, socket := startServer(t, Config{}, ServerConfig{MaxConns: 2})
	first, second := dial(t, socket, adminToken), dial(t, socket, adminToken)
	if got := answers(t, socket, ""); !strings.HasPrefix(got, "-ERR too many connections") {
		t.Fatalf("the third: %q", got)
	}
	do(t, first, "QUIT")
	first.Close()
	do(t, second, "PING")
	// The place is free when the server has seen the first one go.
	for {
		c, err := resp.Dial(t.Context(), "unix", socket, resp.DialOptions{Token: adminToken})
		if err == nil {
			c.Close()
			return
		}
		if t.Context().Err() != nil || !strings.Contains(err.Error(), "too many") && !strings.Contains(err.Error(), "pipe") && !strings.Contains(err.Error(), "reset") {
			t.Fatal(err)
		}
	}
}

func TestPipelining(t *testing.T) {
	_, socket := startServer(t, Config{}, ServerConfig{})
	nc := raw(t, socket)
	var send []byte
	const n = 500
	for range n {
		send = resp.AppendArray(send, 2)
		send = resp.AppendBulkString(send, "ping")
		send = resp.AppendBulkString(send, strings.Repeat("x", 100))
	}
	go func() {
		io.WriteString(nc, rawAuth)
		nc.Write(send)
		io.WriteString(nc, "*1\r\n$4\r\nquit\r\n")
	}()
	all, err := io.ReadAll(nc)
	if err != nil || bytes.Count(all, []byte("$100\r\n")) != n {
		t.Fatalf("%d replies, %v", bytes.Count(all, []byte("$100\r\n")), err)
	}
}

func TestListenUnix(t *testing.T) {
	dir, err := os.MkdirTemp("", "spirt")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	ln, err := ListenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(path); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("twice: %v", err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false) // as when the process is killed
	ln.Close()
	ln, err = ListenUnix(path)
	if err != nil {
		t.Fatalf("over a socket left behind: %v", err)
	}
	ln.Close()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(path); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("over a file: %v", err)
	}
	if _, err := ListenUnix(filepath.Join(dir, strings.Repeat("x", 100))); err == nil || !strings.Contains(err.Error(), "shorter") {
		t.Errorf("a long path: %v", err)
	}
}

// TestCloseUnderLoad closes the server while connections work.
func TestCloseUnderLoad(t *testing.T) {
	db := open(t, Config{})
	set(t, db, "x", constant(100_000, 1))
	dir, err := os.MkdirTemp("", "spirt")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ln, err := ListenUnix(filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(db, ServerConfig{Tokens: []Token{{Secret: adminToken, Access: All}}})
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	var wg sync.WaitGroup
	started := make(chan struct{}, 4)
	for range 4 {
		c := dial(t, ln.Addr().String(), adminToken)
		wg.Go(func() {
			for i := 0; ; i++ {
				if _, err := c.Do(t.Context(), "TENSOR.GET", "x"); err != nil {
					return
				}
				if i == 0 {
					started <- struct{}{}
				}
			}
		})
	}
	for range 4 {
		<-started
	}
	s.Close()
	wg.Wait()
	if err := <-served; err != nil {
		t.Errorf("Serve: %v", err)
	}
	if err := s.Serve(ln); err != nil {
		t.Errorf("Serve after Close: %v", err)
	}
	db.Delete("x")
	if used := db.Stats().MemoryUsed; used != 0 {
		t.Errorf("%d bytes are still referenced", used)
	}
}

// FuzzServer sends bytes to a connection that has authenticated.
func FuzzServer(f *testing.F) {
	f.Add([]byte("*6\r\n$10\r\nTENSOR.SET\r\n$1\r\nk\r\n$5\r\nuint8\r\n$1\r\n1\r\n$1\r\n3\r\n$3\r\nabc\r\n*2\r\n$10\r\nTENSOR.GET\r\n$1\r\nk\r\n"))
	f.Add([]byte("*5\r\n$18\r\nTENSOR.ACCUMULATOR\r\n$1\r\na\r\n$1\r\n1\r\n$1\r\n2\r\n$1\r\n1\r\n*4\r\n$17\r\nTENSOR.ACCUMULATE\r\n$1\r\na\r\n$1\r\n1\r\n$4\r\n\x00\x00\x80\x7f\r\n"))
	f.Add([]byte("*9\r\n$13\r\nTENSOR.UPDATE\r\n$1\r\na\r\n$1\r\nb\r\n$1\r\nc\r\n$4\r\nSTEP\r\n$1\r\n1\r\n$3\r\nSGD\r\n$2\r\nLR\r\n$1\r\n1\r\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		db := open(t, Config{MaxMemory: 1 << 20})
		var log bytes.Buffer // a panic that the server recovers from is logged
		logger := slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelError}))
		s := NewServer(db, ServerConfig{Logger: logger, MaxBulk: 1 << 16, Tokens: []Token{{Secret: adminToken, Access: All}}})
		ours, theirs := net.Pipe()
		go func() {
			io.WriteString(ours, rawAuth)
			ours.Write(in)
			ours.Close()
		}()
		go io.Copy(io.Discard, ours)
		s.serve(theirs)
		if log.Len() > 0 {
			t.Fatal(log.String())
		}
	})
}

package tensordb

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/resp"
)

// granted serves a database with what an invocation needs, and more that is not its own.
func granted(t *testing.T, config ServerConfig) (*DB, *Server, string, Grant) {
	t.Helper()
	db, s, socket := startTheServer(t, Config{}, config)
	for _, key := range []string{"parameters", "images", "labels", "other", "{job:2}:parameters"} {
		if key[0] != '{' {
			key = testPrefix + key
		}
		set(t, db, key, constant(4, 1))
	}
	for _, key := range []string{"sum", "another sum"} {
		if err := db.Accumulator(testPrefix+key, 4, 3, 3); err != nil {
			t.Fatal(err)
		}
	}
	return db, s, socket, Grant{
		Read:       []string{testPrefix + "parameters", testPrefix + "images", testPrefix + "labels"},
		Accumulate: testPrefix + "sum", Minibatch: 1, Life: time.Minute,
	}
}

func sign(t *testing.T, s *Server, g Grant) string {
	t.Helper()
	token, err := s.Sign(g)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// TestHostileInstance has the holder of one invocation's token try whatever else there is to do.
func TestHostileInstance(t *testing.T) {
	db, s, socket, g := granted(t, ServerConfig{})
	token := sign(t, s, g)
	c := dial(t, socket, token)
	before := db.Stats()
	bytes16 := make([]byte, 16)
	own, other := testPrefix+"parameters", testPrefix+"other"
	for _, command := range [][]any{
		{"TENSOR.GET", other}, {"TENSOR.GET", "{job:2}:parameters"}, {"TENSOR.ROWS", other, 0}, {"TENSOR.HASH", other},
		{"EXISTS", own, other}, {"TENSOR.GET", testPrefix}, {"TENSOR.GET", own + "/"},
		{"KEYS", "*"}, {"KEYS", testPrefix + "*"}, {"INFO"},
		{"TENSOR.SET", own, "float32", 1, 4, bytes16}, {"TENSOR.COPY", own, own}, {"DEL", own}, {"DEL", g.Accumulate},
		{"TENSOR.ACCUMULATOR", g.Accumulate, 4, 3, 3}, {"TENSOR.SKIP", g.Accumulate, 1}, {"TENSOR.AVERAGE", own, g.Accumulate},
		{"TENSOR.MEAN", own, own}, {"TENSOR.WMEAN", own, 1, own},
		{"TENSOR.UPDATE", own, own + "/state", own, "STEP", 1, "SGD", "LR", 1},
		{"TENSOR.ACCUMULATE", g.Accumulate, 0, bytes16}, {"TENSOR.ACCUMULATE", g.Accumulate, 2, bytes16},
		{"TENSOR.ACCUMULATE", g.Accumulate, "01", bytes16}, {"TENSOR.ACCUMULATE", testPrefix + "another sum", 1, bytes16},
	} {
		wantCode(t, c, "NOPERM", command...)
	}
	if after := db.Stats(); after != before {
		t.Errorf("something changed: %+v, it was %+v", after, before)
	}
	refused := s.Stats().NotAllowed
	if refused != 24 {
		t.Errorf("%d commands counted as not allowed, want 24", refused)
	}
	for _, key := range g.Read {
		do(t, c, "TENSOR.GET", key)
		do(t, c, "TENSOR.HASH", key)
	}
	// Its own minibatch, once, on however many connections.
	if r := do(t, c, "TENSOR.ACCUMULATE", g.Accumulate, 1, bytes16); string(r.Bytes) != "BUFFERED" {
		t.Errorf("its own minibatch: %s", r.Bytes)
	}
	for _, c := range []*resp.Conn{c, dial(t, socket, token)} {
		if r := do(t, c, "TENSOR.ACCUMULATE", g.Accumulate, 1, bytes16); string(r.Bytes) != "DUPLICATE" {
			t.Errorf("again: %s", r.Bytes)
		}
	}
	// Another invocation's token on the same connection takes the place of the first.
	g.Minibatch = 2
	do(t, c, "AUTH", sign(t, s, g))
	wantCode(t, c, "NOPERM", "TENSOR.ACCUMULATE", g.Accumulate, 1, bytes16)
	do(t, c, "TENSOR.ACCUMULATE", g.Accumulate, 2, bytes16)
	// One that only evaluates adds nothing.
	g.Accumulate, g.Minibatch = "", 0
	do(t, c, "AUTH", sign(t, s, g))
	wantCode(t, c, "NOPERM", "TENSOR.ACCUMULATE", testPrefix+"sum", 0, bytes16)
	wantCode(t, c, "NOPERM", "TENSOR.ACCUMULATE", "", 0, bytes16)
}

// TestForgedGrants changes each byte of a token, and shows one of another server and one whose time is over.
func TestForgedGrants(t *testing.T) {
	_, s, _, g := granted(t, ServerConfig{})
	token := sign(t, s, g)
	if s.openGrant(token) == nil {
		t.Fatal("the token is refused")
	}
	for i := range token {
		forged := []byte(token)
		forged[i] ^= 1
		if s.openGrant(string(forged)) != nil {
			t.Errorf("byte %d does not matter", i)
		}
	}
	_, other, _, _ := granted(t, ServerConfig{})
	g.Life = -time.Second
	for what, text := range map[string]string{
		"of another server": sign(t, other, Grant{Life: time.Minute}), "over": sign(t, s, g), "empty": "", "mark": grantMark,
		"short": token[:len(token)-1], "long": token + "A", "no sum": token[:strings.LastIndexByte(token, '.')] + ".",
	} {
		if s.openGrant(text) != nil {
			t.Errorf("a token is taken that is %s", what)
		}
	}
	if _, err := s.Sign(Grant{Read: make([]string, 9)}); err == nil {
		t.Error("a grant of nine keys is signed")
	}
	if _, err := s.Sign(Grant{Accumulate: strings.Repeat("k", maxArg)}); err == nil {
		t.Error("a token is signed that no server reads")
	}
}

func FuzzOpenGrant(f *testing.F) {
	s := NewServer(nil, ServerConfig{})
	token, err := s.Sign(Grant{Read: []string{"p", "i"}, Accumulate: "a", Minibatch: 3, Life: time.Hour})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(token)
	f.Add(grantMark)
	f.Add("grant.e30.AAAA")
	f.Fuzz(func(t *testing.T, text string) {
		if text != token && s.openGrant(text) != nil {
			t.Errorf("%q is taken", text)
		}
	})
}

func TestTokenConnections(t *testing.T) {
	_, s, socket, g := granted(t, ServerConfig{MaxTokenConns: 2})
	token := sign(t, s, g)
	first, second := dial(t, socket, token), dial(t, socket, token)
	third := dial(t, socket, "")
	wantCode(t, third, "ERR", "AUTH", token)
	wantCode(t, third, "NOAUTH", "PING") // it is none of them
	do(t, third, "AUTH", adminToken)     // others are not kept out
	do(t, first, "AUTH", token)          // once more on one is not one more
	do(t, second, "AUTH", adminToken)
	do(t, dial(t, socket, token), "PING") // the place of second
	if n := s.Stats().TooMany; n != 1 {
		t.Errorf("%d refused, want 1", n)
	}
}

// TestSteadyButSlow: a stranger that sends something all the time, and a command that never ends, are cut off.
func TestSteadyButSlow(t *testing.T) {
	db, s, socket, g := granted(t, ServerConfig{AuthTimeout: 50 * time.Millisecond, CommandTimeout: 50 * time.Millisecond})
	auth := fmt.Sprintf("*2\r\n$4\r\nAUTH\r\n$%d\r\n%s\r\n", len(adminToken), adminToken)
	for name, c := range map[string]struct{ once, again string }{
		"stranger":            {"", "*1\r\n$4\r\nPING\r\n"},
		"stranger's argument": {"*2\r\n$4\r\nAUTH\r\n$4000\r\nxx", ""},
		"tensor":              {auth + fmt.Sprintf("*4\r\n$17\r\nTENSOR.ACCUMULATE\r\n$%d\r\n%s\r\n$1\r\n1\r\n$16\r\n", len(g.Accumulate), g.Accumulate), ""},
		"refused tensor":      {auth + "*4\r\n$17\r\nTENSOR.ACCUMULATE\r\n$1\r\nx\r\n$1\r\n1\r\n$1000000000\r\n", "xxxx"},
	} {
		nc := raw(t, socket)
		closed := make(chan error, 1)
		go func() {
			_, err := io.Copy(io.Discard, nc)
			closed <- err
		}()
		_, err := io.WriteString(nc, c.once)
		for err == nil && c.again != "" { // until the server closes
			_, err = io.WriteString(nc, c.again)
		}
		if err := <-closed; err != nil && strings.Contains(err.Error(), "i/o timeout") {
			t.Errorf("%s: not cut off", name)
		}
	}
	for deadline := time.Now().Add(20 * time.Second); s.Stats().TimedOut < 4; {
		if time.Now().After(deadline) {
			t.Fatalf("%+v", s.Stats())
		}
	}
	info := do(t, dial(t, socket, adminToken), "INFO").Bytes
	for _, line := range []string{"rejected_connections:0", "wrong_tokens:0", "not_allowed:0", "malformed:0", "timed_out:4"} {
		if !bytes.Contains(info, []byte(line+"\r\n")) {
			t.Errorf("INFO has no %s: %s", line, info)
		}
	}
	if used := db.Stats(); used.Accumulators != 2 {
		t.Errorf("%+v", used)
	}
}

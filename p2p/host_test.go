package p2p

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/internal/treehash"
)

func TestKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key.pem")
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	if err := WriteKey(path, key); err != nil {
		t.Fatal(err)
	}
	if got, err := LoadKey(path); err != nil || !got.Equal(key) {
		t.Fatalf("read back: %v", err)
	}
	if err := WriteKey(path, key); !errors.Is(err, os.ErrExist) {
		t.Errorf("overwriting: %v", err)
	}
	id, err := ID(key.Public().(ed25519.PublicKey))
	if err != nil || !strings.HasPrefix(string(id), "12D3Koo") {
		t.Errorf("ID %q, %v", id, err)
	}
	if public, err := id.PublicKey(); err != nil || !public.Equal(key.Public()) {
		t.Errorf("public key of %s: %v", id, err)
	}
	if runtime.GOOS != "windows" {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("mode %v, %v", info.Mode(), err)
		}
		if err := os.Chmod(path, 0o640); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadKey(path); err == nil || !strings.Contains(err.Error(), `mode 0640`) || !strings.Contains(err.Error(), "chmod 600 "+path) {
			t.Errorf("a key that others may read: %v", err)
		}
	}
}

func TestWrongKeys(t *testing.T) {
	dir := t.TempDir()
	other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(other)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		text []byte
		want string
	}{
		"empty":     {nil, "no PEM block"},
		"text":      {[]byte("hello"), "no PEM block"},
		"public":    {pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY"}), "no PEM block"},
		"garbage":   {pem.EncodeToMemory(&pem.Block{Type: keyBlock, Bytes: []byte{1}}), "asn1"},
		"P-256":     {pem.EncodeToMemory(&pem.Block{Type: keyBlock, Bytes: der}), "not an Ed25519 key"},
		"very long": {bytes.Repeat([]byte("x"), maxKeyFile+1), "not a private key"},
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, c.text, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadKey(path); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := LoadKey(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	for _, id := range []PeerID{"", "12D3Koo", "QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"} {
		if _, err := id.PublicKey(); err == nil {
			t.Errorf("peer ID %q has a public key", id)
		}
	}
	if _, err := ID(nil); err == nil {
		t.Error("no key has an ID")
	}
	if err := WriteKey(filepath.Join(dir, "short"), ed25519.PrivateKey{1}); err == nil {
		t.Error("a key of one byte was written")
	}
}

func TestAddresses(t *testing.T) {
	for in, want := range map[string]string{
		"127.0.0.1:80":               "/ip4/127.0.0.1/tcp/80",
		":4001":                      "/ip4/0.0.0.0/tcp/4001",
		"[::1]:0":                    "/ip6/::1/tcp/0",
		"[::ffff:1.2.3.4]:9":         "/ip4/1.2.3.4/tcp/9",
		"peer.example:4001":          "/dns/peer.example/tcp/4001",
		"/dns4/peer.example/tcp/400": "/dns4/peer.example/tcp/400",
	} {
		if got, id, err := parseAddress(in); err != nil || got.String() != want || id != "" {
			t.Errorf("%s: %v, %q, %v", in, got, id, err)
		}
	}
	const id = "12D3KooWHuujKGhuC6Y9NYvi5wC6xnu5WFA9NuCbZbM7MMxVFYMw"
	if got, of, err := parseAddress("/ip4/1.2.3.4/tcp/5/p2p/" + id); err != nil || got.String() != "/ip4/1.2.3.4/tcp/5" || of.String() != id {
		t.Errorf("%v, %s, %v", got, of, err)
	}
	for in, want := range map[string]string{
		"":                           "missing port",
		"127.0.0.1":                  "write host:port or a multiaddress",
		"127.0.0.1:http":             "not a number",
		"127.0.0.1:70000":            "not a number",
		"/ip4/1.2.3.4":               "want /ip4, /ip6 or /dns and then /tcp",
		"/ip4/1.2.3.4/udp/5/quic-v1": "want /ip4, /ip6 or /dns and then /tcp",
		"/p2p/" + id:                 "names no host and port",
		"/ip4/1.2.3/tcp/5":           "invalid",
		strings.Repeat("x", 600):     "600 bytes",
	} {
		if got, _, err := parseAddress(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v", in, got, err)
		}
	}
}

func TestConfigErrors(t *testing.T) {
	g := newGroup(t, 2)
	stranger, _ := NewKey()
	for want, change := range map[string]func(*Config){
		"private key has 64 bytes":     func(c *Config) { c.Key = nil },
		"no Check":                     func(c *Config) { c.Check = nil },
		"heartbeat of -1ns":            func(c *Config) { c.Heartbeat = -1 },
		"heartbeat of 2m0s":            func(c *Config) { c.Heartbeat = 2 * time.Minute },
		"members 0 and 2 have one key": func(c *Config) { c.Members = append(c.Members, Member{Index: 2, Key: c.Members[0].Key}) },
		"member 7: an Ed25519":         func(c *Config) { c.Members = []Member{c.Members[0], {7, []byte{1}}} },
		"two members of index 1":       func(c *Config) { c.Members[0].Index = 1 },
		"a member of index -1":         func(c *Config) { c.Members[0].Index = -1 },
		"a member of index 65536":      func(c *Config) { c.Members[0].Index = 1 << 16 },
		"at most 1024":                 func(c *Config) { c.Members = make([]Member, 1025) },
		"is not among the 2 members":   func(c *Config) { c.Key = stranger },
		"limit Queue is negative":      func(c *Config) { c.Limits.Queue = -1 },
		"limit MessageSize":            func(c *Config) { c.Limits.MessageSize = 1 << 30 },
		"limit BodySize":               func(c *Config) { c.Limits.BodySize = 1 << 50 },
		"leave the identity out": func(c *Config) {
			c.Listen = []string{"/ip4/127.0.0.1/tcp/0/p2p/12D3KooWHuujKGhuC6Y9NYvi5wC6xnu5WFA9NuCbZbM7MMxVFYMw"}
		},
		"this machine has no such address":  func(c *Config) { c.Listen = []string{"192.0.2.1:0"} },
		"write host:port or a multiaddress": func(c *Config) { c.Listen = []string{"127.0.0.1:0", "4001"} },
	} {
		c := g.config(0)
		change(&c)
		if h, err := New(c); err == nil {
			h.Close()
			t.Errorf("%s: accepted", want)
		} else if !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in %q", want, err)
		}
	}
}

func TestTakenPortIsNamed(t *testing.T) {
	checkGoroutines(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	g := newGroup(t, 2)
	c := g.config(0)
	c.Listen = []string{"127.0.0.1:0", taken.Addr().String()}
	_, err = New(c)
	if err == nil || !strings.Contains(err.Error(), "listening on "+taken.Addr().String()+": the port is taken by another process: stop that one, name another port, or use port 0") {
		t.Errorf("error %v", err)
	}
	// Taken by another peer: libp2p would share the port between the two.
	p := g.start(1)
	addr, _, _ := parseAddress(p.Addrs()[0])
	c.Listen = []string{addr.String()}
	if _, err = New(c); err == nil || !strings.Contains(err.Error(), "the port is taken") {
		t.Errorf("error %v", err)
	}
	p.Close()
}

func TestForeignIdentityIsRefused(t *testing.T) {
	g := newGroup(t, 2)
	p := g.start(0)
	// The foreigner has member 0 on a roster of its own.
	f := newGroup(t, 2)
	f.keys[0], f.members[0] = g.keys[0], g.members[0]
	foreign := f.start(1)
	if err := foreign.SetAddresses(0, p.Addrs()); err != nil {
		t.Fatal(err)
	}
	p.wait("inbound refused", func() bool {
		return len(p.refused) > 0 && p.refused[0].Remote == foreign.ID() && p.refused[0].Reason == "it is not on the roster of this job" &&
			strings.HasPrefix(p.refused[0].Address, "/ip4/127.0.0.1/tcp/")
	})
	if n := p.Stats().Refused; n == 0 {
		t.Error("not counted")
	}

	// The other direction: the foreigner listens where member 1 should.
	q := g.start(0, func(c *Config) { c.Listen = nil })
	addr, _, _ := parseAddress(foreign.Addrs()[0])
	if err := q.SetAddresses(1, []string{addr.String()}); err != nil {
		t.Fatal(err)
	}
	want := Refused{Remote: foreign.ID(), Address: addr.String(), Reason: fmt.Sprintf("it answers at an address of member 1, %s", q.roster.at[1].name)}
	q.wait("outbound refused", func() bool { return len(q.refused) > 0 && q.refused[0] == want })

	err := q.SetAddresses(1, foreign.Addrs())
	if err == nil || !strings.Contains(err.Error(), string(foreign.ID())) || !strings.Contains(err.Error(), "of member 1") {
		t.Errorf("an address that names the foreigner: %v", err)
	}
	for _, x := range []*testPeer{p, q, foreign} {
		x.Close()
		if len(x.connected) > 0 || len(x.reasons) > 0 {
			t.Errorf("peer %d was connected: %v, %v", x.index, x.connected, x.reasons)
		}
	}
	if err := q.SetAddresses(2, nil); err == nil {
		t.Error("addresses of nobody")
	}
	if err := q.SetAddresses(1, make([]string, 17)); err == nil {
		t.Error("17 addresses")
	}
}

func TestRefusalsAreThinnedOut(t *testing.T) {
	q := newEventQueue(1000)
	now := time.Unix(0, 0)
	for range 1000 {
		q.putRefused(Refused{}, now)
	}
	if n := len(q.pending); n != refusalBurst {
		t.Errorf("%d events at once, want %d", n, refusalBurst)
	}
	q.putRefused(Refused{}, now.Add(time.Second/refusalRate))
	q.putRefused(Refused{}, now.Add(time.Second/refusalRate))
	if n := len(q.pending); n != refusalBurst+1 {
		t.Errorf("%d events, want one more", n)
	}
}

// TestMissingLink: 0 and 1 are not connected, 2 is to both.
func TestMissingLink(t *testing.T) {
	g := newGroup(t, 3)
	for i := range 3 {
		g.start(i, func(c *Config) {
			if i < 2 {
				c.Listen = nil
			}
		})
	}
	a, b, c := g.peers[0], g.peers[1], g.peers[2]
	a.says(1, "said before there was anyone")
	a.dials(c)
	b.dials(c)
	b.wait("connected", func() bool { return b.connected[2] })
	b.hears("said before there was anyone")
	a.wait("connected", func() bool { return a.connected[2] })
	for i := range 20 {
		a.says(2, fmt.Sprint("from a ", i))
		b.says(2, fmt.Sprint("from b ", i))
	}
	for i := range 20 {
		b.hears(fmt.Sprint("from a ", i))
		a.hears(fmt.Sprint("from b ", i))
		c.hears(fmt.Sprint("from a ", i), fmt.Sprint("from b ", i))
	}
	if s := a.Stats(); s.Connected != 1 {
		t.Errorf("a is connected to %d members", s.Connected)
	}
	if s := a.Stats(); s.Duplicates != 0 {
		t.Errorf("%d duplicates came back to a", s.Duplicates)
	}
}

// TestReturningMember: one that stops and starts again, at another port, gets
// what was said meanwhile, and what it said itself.
func TestReturningMember(t *testing.T) {
	g := newGroup(t, 3)
	g.startAll()
	a, b, c := g.peers[0], g.peers[1], g.peers[2]
	b.says(6, "my own")
	a.hears("my own")
	c.hears("my own")
	b.Close()
	for _, p := range []*testPeer{a, c} {
		p.wait("b is gone", func() bool { return !p.connected[1] })
		if got := p.reasons[1]; len(got) != 1 || got[0] != "it stopped" {
			t.Errorf("reasons %q", got)
		}
	}
	a.says(5, "too old")
	a.says(7, "meanwhile")
	c.says(8, "also meanwhile")
	a.Forget(6)
	c.hears("too old", "meanwhile")
	c.Forget(6)
	b = g.start(1)
	a.dials(b) // a knows the new port; c learns of b through b's own dialling
	b.dials(c)
	b.hears("meanwhile", "also meanwhile", "my own")
	a.wait("back", func() bool { return a.connected[1] })
	c.wait("back", func() bool { return c.connected[1] })
	b.says(9, "here again")
	a.hears("here again")
	c.hears("here again")
	a.says(3, "below what others want")
	a.says(10, "last")
	c.hears("last")
	b.hears("last")
	for _, p := range g.peers {
		p.Close()
	}
	if b.texts["too old"] != 0 || c.texts["below what others want"] != 0 {
		t.Errorf("forgotten messages came: %v, %v", b.texts, c.texts)
	}
	if c.Stats().Stale == 0 {
		t.Error("a message below Forget's slot was not counted")
	}
}

// TestBothDialAtOnce: two connections settle to one, without a break.
func TestBothDialAtOnce(t *testing.T) {
	g := newGroup(t, 2)
	g.beat = testHeartbeat
	g.limits.Rate = 1 << 20
	a, b := g.start(0), g.start(1)
	// Dialled by hand, past the dialler that avoids it.
	for range 2 {
		ids := [2]*testPeer{a, b}
		errs := make(chan error, 2)
		for i, p := range ids {
			o := ids[1-i]
			go func() {
				r := &rawPeer{fabric: p.net, t: t}
				errs <- r.dial(o)
			}()
		}
		for range 2 {
			if err := <-errs; err != nil {
				t.Fatal(err)
			}
		}
	}
	a.wait("connected", func() bool { return a.connected[1] })
	b.wait("connected", func() bool { return b.connected[0] })
	one := func(p *testPeer) bool {
		p.Host.mu.Lock()
		defer p.Host.mu.Unlock()
		return len(p.sessions) == 1
	}
	for i := 0; !one(a) || !one(b); i++ {
		a.says(uint64(i), fmt.Sprint("a ", i))
		b.says(uint64(i), fmt.Sprint("b ", i))
		b.hears(fmt.Sprint("a ", i))
		a.hears(fmt.Sprint("b ", i))
		a.Forget(uint64(i))
		b.Forget(uint64(i))
		if i > 100_000 {
			t.Fatal("they keep two connections")
		}
	}
	a.says(1<<40, "a after")
	b.says(1<<40, "b after")
	b.hears("a after")
	a.hears("b after")
	for _, p := range []*testPeer{a, b} {
		p.wait("no break", func() bool { return len(p.reasons) == 0 })
	}
}

func TestCloseDeliversWhatWasSaid(t *testing.T) {
	checkGoroutines(t)
	g := newGroup(t, 2)
	g.startAll()
	for i := range 50 {
		g.peers[0].says(uint64(i), fmt.Sprint("word ", i))
	}
	if err := g.peers[0].Close(); err != nil {
		t.Error(err)
	}
	if err := g.peers[0].Close(); err != nil {
		t.Error(err)
	}
	for i := range 50 {
		g.peers[1].hears(fmt.Sprint("word ", i))
	}
	if err := g.peers[0].Broadcast(nil, Meta{}); !errors.Is(err, errClosed) {
		t.Errorf("broadcast after close: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := g.peers[0].Fetch(ctx, treehash.Hash{}, 1, []int{1}); !errors.Is(err, errClosed) {
		t.Errorf("fetch after close: %v", err)
	}
	g.peers[1].Close()
}

func TestCloseEndsAFetch(t *testing.T) {
	checkGoroutines(t)
	g := newGroup(t, 2)
	p := g.start(0)
	got := make(chan error, 1)
	go func() {
		_, err := p.Fetch(context.Background(), treehash.Hash{}, 1<<20, []int{1})
		got <- err
	}()
	p.Close()
	select {
	case err := <-got:
		if !errors.Is(err, errClosed) {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("the fetch goes on")
	}
}

func TestBroadcastChecksItsArguments(t *testing.T) {
	g := newGroup(t, 2)
	p := g.start(0)
	if err := p.Broadcast(make([]byte, 64<<10+1), Meta{}); err == nil || !strings.Contains(err.Error(), "at most 65536") {
		t.Errorf("oversize: %v", err)
	}
	if err := p.Broadcast(nil, Meta{From: 2}); err == nil {
		t.Error("from nobody")
	}
}

func TestFetchChecksItsArguments(t *testing.T) {
	g := newGroup(t, 2)
	p := g.start(0)
	ctx := context.Background()
	for _, c := range []struct {
		hash treehash.Hash
		size int64
		from []int
	}{
		{treehash.Hash{}, -1, []int{1}},
		{treehash.Hash{}, 1<<30 + 1, []int{1}},
		{treehash.Hash{}, 0, []int{1}},
		{treehash.Hash{}, 5, nil},
		{treehash.Hash{}, 5, []int{0}},
		{treehash.Hash{}, 5, []int{2}},
		{treehash.Hash{}, 5, make([]int, 65)},
	} {
		if _, err := p.Fetch(ctx, c.hash, c.size, c.from); err == nil {
			t.Errorf("accepted: %+v", c)
		}
	}
	if b, err := p.Fetch(ctx, treehash.Sum(nil), 0, nil); err != nil || len(b) != 0 {
		t.Errorf("no bytes: %v, %v", b, err)
	}
}

// TestUnreadEventsHoldMembersBack: they are not lost, not piled up, and nobody
// counts as silent because of it.
func TestUnreadEventsHoldMembersBack(t *testing.T) {
	g := newGroup(t, 2)
	g.beat = testHeartbeat
	p := g.start(1)
	c := g.config(0)
	c.Limits.Events = 4
	h, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if err := h.SetAddresses(1, p.Addrs()); err != nil {
		t.Fatal(err)
	}
	p.wait("connected", func() bool { return p.connected[0] })
	const n = 200
	for i := range n {
		p.says(uint64(i), fmt.Sprint(i))
	}
	// Its reader waits; more heartbeats pass than make a member count as gone.
	tick := time.NewTicker(testHeartbeat)
	defer tick.Stop()
	for range missedHeartbeats + 4 {
		<-tick.C
	}
	h.events.mu.Lock()
	waiting := len(h.events.pending)
	h.events.mu.Unlock()
	if waiting > 2*c.Limits.Events {
		t.Errorf("%d events wait", waiting)
	}
	messages := 0
	for e := range h.Events() {
		switch e := e.(type) {
		case Message:
			messages++
		case Disconnected:
			t.Fatalf("disconnected: %s", e.Reason)
		}
		if messages == n {
			break
		}
	}
}

func TestSixteenPeers(t *testing.T) {
	checkGoroutines(t)
	g := newGroup(t, 16)
	g.startAll()
	body := randomBody(treehash.ChunkSize + 1)
	hash := g.peers[3].shelf.put(body)
	for i, p := range g.peers {
		p.says(1, fmt.Sprint("from ", i))
	}
	for i, p := range g.peers {
		for j := range g.peers {
			if i != j {
				p.hears(fmt.Sprint("from ", j))
			}
		}
		if i != 3 {
			mustFetch(t, p, hash, body, 3)
		}
		if len(p.reasons) > 0 {
			t.Errorf("peer %d lost connections: %v", i, p.reasons)
		}
	}
	closed := make(chan error)
	for _, p := range g.peers {
		go func() { closed <- p.Close() }()
	}
	for range g.peers {
		if err := <-closed; err != nil {
			t.Error(err)
		}
	}
	if s := g.peers[3].shelf; s.held != 0 {
		t.Errorf("%d bodies were not released", s.held)
	}
}

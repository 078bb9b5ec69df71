package p2p

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	ma "github.com/multiformats/go-multiaddr"
)

// TestAskToJoin: a stranger asks, is put on the roster, and connects.
func TestAskToJoin(t *testing.T) {
	g := newGroup(t, 3)
	a := g.start(0, func(c *Config) {
		c.Members = g.roster(0, 1)
		c.Guests = func(ctx context.Context, remote PeerID, request []byte) ([]byte, error) {
			id, _ := ID(g.members[2])
			if remote != id {
				return nil, fmt.Errorf("%s is not invited", remote)
			}
			if err := g.peers[0].SetMembers(g.roster()); err != nil {
				return nil, err
			}
			return append([]byte("welcome, "), request...), nil
		}
	})
	answer, err := Ask(t.Context(), g.keys[2], a.Addrs(), [32]byte{1}, []byte("newcomer"))
	if err != nil || string(answer) != "welcome, newcomer" {
		t.Fatalf("%q, %v", answer, err)
	}
	c := g.start(2)
	c.dials(a)
	a.wait("connected", func() bool { return a.connected[2] })
	// Asked again by what is a member now: the answer may have been lost.
	if answer, err = Ask(t.Context(), g.keys[2], a.Addrs(), [32]byte{1}, []byte("again")); err != nil || string(answer) != "welcome, again" {
		t.Errorf("%q, %v", answer, err)
	}
	stranger, _ := NewKey()
	if _, err = Ask(t.Context(), stranger, a.Addrs(), [32]byte{1}, nil); err == nil || !strings.Contains(err.Error(), "it refused: \"12D3Koo") {
		t.Errorf("one who is not invited: %v", err)
	}
	if s := a.Stats(); s.Guests != 3 || s.GuestsRefused != 0 {
		t.Errorf("stats %+v", s)
	}
	poll(t, "guests leave", func() bool { a.Host.mu.Lock(); defer a.Host.mu.Unlock(); return len(a.guests) == 0 })
}

func TestAskErrors(t *testing.T) {
	g := newGroup(t, 3)
	yes := func(context.Context, PeerID, []byte) ([]byte, error) { return make([]byte, MaxAnswer), nil }
	a := g.start(0, func(c *Config) { c.Members = g.roster(0, 1); c.Guests = yes })
	closed := g.start(1, func(c *Config) { c.Members = g.roster(0, 1) })
	key, job := g.keys[2], [32]byte{1}
	bare, _, _ := strings.Cut(a.Addrs()[0], "/p2p/")
	wrong := bare + "/p2p/" + string(closed.ID())
	for _, c := range []struct {
		name, want string
		ask        func() ([]byte, error)
	}{
		{"no key", "private key has 64 bytes", func() ([]byte, error) { return Ask(t.Context(), nil, a.Addrs(), job, nil) }},
		{"no address", "want 1 to 64", func() ([]byte, error) { return Ask(t.Context(), key, nil, job, nil) }},
		{"no identity", "does not name its peer", func() ([]byte, error) { return Ask(t.Context(), key, []string{bare}, job, nil) }},
		{"too much", "a request of 65537 bytes", func() ([]byte, error) { return Ask(t.Context(), key, a.Addrs(), job, make([]byte, MaxAsk+1)) }},
		{"another identity", "peer id mismatch", func() ([]byte, error) { return Ask(t.Context(), key, []string{wrong}, job, nil) }},
		{"another job", "it works on another job", func() ([]byte, error) { return Ask(t.Context(), key, a.Addrs(), [32]byte{2}, nil) }},
		{"no guests", "it takes no guests", func() ([]byte, error) { return Ask(t.Context(), key, closed.Addrs(), job, nil) }},
		{"nobody there", "asking " + string(a.ID()), func() ([]byte, error) {
			return Ask(t.Context(), key, []string{"/ip4/127.0.0.1/tcp/1/p2p/" + string(a.ID())}, job, nil)
		}},
	} {
		if answer, err := c.ask(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %d bytes, %v", c.name, len(answer), err)
		}
	}
	// The second of two peers answers, at length.
	answer, err := Ask(t.Context(), key, append(closed.Addrs(), a.Addrs()...), job, make([]byte, MaxAsk))
	if err != nil || len(answer) != MaxAnswer {
		t.Errorf("%d bytes, %v", len(answer), err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Ask(ctx, key, a.Addrs(), job, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %v", err)
	}
}

// TestLongAnswersAndRefusals are cut to what the wire carries.
func TestLongAnswersAndRefusals(t *testing.T) {
	g := newGroup(t, 2)
	a := g.start(0, func(c *Config) {
		c.Members = g.roster(0)
		c.Guests = func(_ context.Context, _ PeerID, request []byte) ([]byte, error) {
			if len(request) == 0 {
				return make([]byte, MaxAnswer+1), nil
			}
			return nil, errors.New(strings.Repeat("no ", 1000))
		}
	})
	if _, err := Ask(t.Context(), g.keys[1], a.Addrs(), [32]byte{1}, nil); err == nil || !strings.Contains(err.Error(), "the answer is too long") {
		t.Errorf("error %v", err)
	}
	if _, err := Ask(t.Context(), g.keys[1], a.Addrs(), [32]byte{1}, []byte("?")); err == nil || !strings.Contains(err.Error(), "no no no") || len(err.Error()) > 2*maxRefusal {
		t.Errorf("error %v", err)
	}
}

// TestStrangersGetNothingElse than an answer: no messages, no bodies, no second
// stream, and no time.
func TestStrangersGetNothingElse(t *testing.T) {
	g := newGroup(t, 2)
	asked := 0
	p := g.start(0, func(c *Config) {
		c.Members = g.roster(0)
		c.Heartbeat = testHeartbeat // two seconds to ask
		c.Guests = func(context.Context, PeerID, []byte) ([]byte, error) { asked++; return nil, nil }
	})
	body := randomBody(100)
	hash := p.shelf.put(body)
	p.says(1, "for members")
	long := appendAsk([32]byte{1}, make([]byte, MaxAsk+1))
	for _, c := range []struct {
		name  string
		bytes []byte
	}{
		{"message stream", appendFrame(openerHead(messageProtocol), frameHello, p.hello.append(nil))},
		{"body stream", request{hash, 100, wantChunk, 0}.append(openerHead(bodyProtocol))},
		{"unknown stream", openerHead("/spirt/other/1")},
		{"no multistream", make([]byte, 100)},
		{"oversize request", long[:len(openerHead(joinProtocol))+36]},
		{"half a request, then nothing", appendAsk([32]byte{1}, make([]byte, 100))[:80]},
		{"no stream at all", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := g.dialRaw(1, p)
			if c.bytes != nil {
				r.send(c.bytes)
				got, _ := io.ReadAll(r.stream)
				if bytes.Contains(got, body) || bytes.Contains(got, []byte("for members")) || len(got) > 100 {
					t.Errorf("it got %q", got)
				}
			}
			r.hungUp()
		})
	}
	// A second stream beside a good one.
	r := g.dialRaw(1, p)
	r.send(appendAsk([32]byte{1}, nil)[:40])
	poll(t, "the first stream is there", func() bool {
		p.Host.mu.Lock()
		defer p.Host.mu.Unlock()
		for _, x := range p.guests {
			return x.streams == 1
		}
		return false
	})
	if s, err := r.conn.NewStream(t.Context()); err == nil { // else its time is over
		s.Write(appendAsk([32]byte{1}, nil))
	}
	r.hungUp()
	if asked != 0 || p.shelf.asked != 0 {
		t.Errorf("%d requests came through, %d bodies were asked for", asked, p.shelf.asked)
	}
	if s := p.Stats(); s.GuestsRefused < 7 || s.Guests != 0 || s.MessagesOut != 0 || s.BodyBytesOut != 0 || s.Connected != 0 {
		t.Errorf("stats %+v", s)
	}
	p.wait("named", func() bool {
		return len(p.refused) > 0 && p.refused[0].Remote == PeerID(r.swarm.LocalPeer().String()) && strings.HasPrefix(p.refused[0].Reason, "it asked to join, but ")
	})
}

// TestFloodOfStrangers: only so many are let in at once, and members do not
// notice.
func TestFloodOfStrangers(t *testing.T) {
	checkGoroutines(t)
	g := newGroup(t, 2)
	hold, most, now := make(chan struct{}), 0, 0
	var mu sync.Mutex
	p := g.start(0, func(c *Config) {
		c.Guests = func(context.Context, PeerID, []byte) ([]byte, error) {
			mu.Lock()
			now++
			most = max(most, now)
			mu.Unlock()
			<-hold
			mu.Lock()
			now--
			mu.Unlock()
			return []byte("yes"), nil
		}
	})
	const strangers = 24
	results := make(chan error, strangers)
	for range strangers {
		key, _ := NewKey()
		go func() {
			_, err := Ask(context.Background(), key, p.Addrs(), [32]byte{1}, nil)
			results <- err
		}()
	}
	refused := 0
	for range strangers - guestsPerAddress { // all but those that are let in
		if err := <-results; err == nil {
			t.Error("answered while the answer waits")
		} else {
			refused++
		}
	}
	o := g.start(1)
	o.dials(p)
	o.wait("a member connects", func() bool { return o.connected[0] })
	p.says(1, "undisturbed")
	o.hears("undisturbed")
	p.Host.mu.Lock()
	if n := len(p.guests); n > guestsPerAddress {
		t.Errorf("%d guests", n)
	}
	p.Host.mu.Unlock()
	close(hold)
	for range guestsPerAddress {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if most != guestsPerAddress {
		t.Errorf("%d were asked at once, want %d", most, guestsPerAddress)
	}
	if s := p.Stats(); s.Guests != guestsPerAddress || s.GuestsRefused < uint64(refused) {
		t.Errorf("%d refused: %+v", refused, s)
	}
	p.Close()
	o.Close()
}

func TestGuestAddress(t *testing.T) {
	for in, want := range map[string]string{
		"/ip4/1.2.3.4/tcp/5":              "1.2.3.4",
		"/ip6/::ffff:1.2.3.4/tcp/5":       "1.2.3.4",
		"/ip6/2001:db8:1:2:3:4:5:6/tcp/7": "2001:db8:1:2::/64",
		"/dns/a.example/tcp/5":            "",
	} {
		if got := guestAddress(ma.StringCast(in)); got != want {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
}

// TestCloseWhileAGuestIsAnswered ends the context that Guests got.
func TestCloseWhileAGuestIsAnswered(t *testing.T) {
	checkGoroutines(t)
	g := newGroup(t, 2)
	begun := make(chan struct{})
	p := g.start(0, func(c *Config) {
		c.Members = g.roster(0)
		c.Guests = func(ctx context.Context, _ PeerID, _ []byte) ([]byte, error) {
			close(begun)
			<-ctx.Done()
			return nil, ctx.Err()
		}
	})
	got := make(chan error)
	go func() {
		_, err := Ask(context.Background(), g.keys[1], p.Addrs(), [32]byte{1}, nil)
		got <- err
	}()
	<-begun
	p.Close()
	select {
	case err := <-got:
		if err == nil {
			t.Error("answered")
		}
	case <-time.After(patience):
		t.Fatal("it still asks")
	}
}

func FuzzAsk(f *testing.F) {
	f.Add(appendAsk([32]byte{1}, []byte("let me in"))[len(openerHead(joinProtocol)):])
	f.Add(append(make([]byte, 32), 255, 255, 255, 255))
	f.Add(make([]byte, 35))
	f.Fuzz(func(t *testing.T, b []byte) {
		request, job, err := readAsk(bytes.NewReader(b))
		if err != nil {
			return
		}
		if again := appendAsk(job, request)[len(openerHead(joinProtocol)):]; len(request) > MaxAsk || !bytes.HasPrefix(b, again) {
			t.Fatal("a request does not encode to what it came from")
		}
	})
}

func FuzzAnswer(f *testing.F) {
	f.Add(appendAnswer(answerYes, []byte("welcome")))
	f.Add(appendAnswer(answerNo, []byte("no")))
	f.Add(appendAnswer(answerOtherJob, nil))
	f.Add([]byte{answerYes, 255, 255, 255, 255})
	f.Add([]byte{answerNo, 0, 0, 1, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		answer, err := readAnswer(bytes.NewReader(b))
		if err == nil && (len(answer) > MaxAnswer || !bytes.HasPrefix(b, appendAnswer(answerYes, answer))) {
			t.Fatal("an answer does not encode to what it came from")
		}
	})
}

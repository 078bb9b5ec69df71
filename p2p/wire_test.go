package p2p

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/internal/treehash"
)

// FuzzFrame reads frames as a session does, and decodes what is in them.
func FuzzFrame(f *testing.F) {
	f.Add([]byte{})
	f.Add(appendFrame(nil, frameHello, hello{run: 7}.append(nil)))
	f.Add(appendFrame(appendFrame(nil, frameMessage, []byte("hi")), frameHeartbeat, []byte{1, 2}))
	f.Add(appendFrame(nil, frameHave, have{[32]byte{1}, 9, 1 << 60, true}.append(nil)))
	f.Add(appendFrame(nil, frameWant, make([]byte, 64)))
	f.Add([]byte{255, 255, 255, 255, frameMessage})
	f.Add(appendFrame(appendFrame(nil, frameAges, []byte{0, 7, 255}), frameRelay, []byte{1}))
	f.Add([]byte{0, 0, 0, 0, 77})
	const size = 1000
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		var scratch []byte
		for {
			before := r.Len()
			kind, payload, next, err := readFrame(r, size, scratch)
			if err != nil {
				if err == io.EOF && before != 0 {
					t.Fatal("a cut frame reads as the end")
				}
				return
			}
			scratch = next
			if bound, err := frameBound(kind, size); err != nil || len(payload) > bound || cap(scratch) > MaxIndex+1 {
				t.Fatalf("kind %d, %d bytes, bound %d, %v, scratch %d", kind, len(payload), bound, err, cap(scratch))
			}
			if again := appendFrame(nil, kind, payload); !bytes.Equal(again, b[len(b)-before:len(b)-r.Len()]) {
				t.Fatal("a frame does not encode to what it came from")
			}
			switch kind {
			case frameHello:
				if h, err := decodeHello(payload); err == nil && !bytes.Equal(h.append(nil), payload) {
					t.Fatal("hello")
				}
			case frameHeartbeat:
				for _, i := range []int{0, 7, 8, MaxIndex} {
					if got := bitset(payload).has(i); got && i/8 >= len(payload) {
						t.Fatal("a bit beyond the bitmap is set")
					}
				}
			case frameRelay:
				if relay, err := decodeRelay(payload); err == nil && relay != (payload[0] == 1) {
					t.Fatal("relay")
				}
			case frameHave:
				list, err := decodeHave(nil, payload)
				if err != nil {
					break
				}
				var again []byte
				for _, e := range list {
					again = e.append(again)
				}
				if !bytes.Equal(again, payload) {
					t.Fatal("have-list")
				}
			case frameWant:
				if list, err := decodeWant(nil, payload); err == nil && len(list)*wantEntry != len(payload) {
					t.Fatal("want-list")
				}
			}
		}
	})
}

func FuzzRequest(f *testing.F) {
	for kind := range byte(6) {
		for _, n := range []int{0, 3, 4, 5} {
			f.Add(request{treehash.Hash{1}, 1 << 20, kind, n}.append(nil))
		}
	}
	f.Add(bytes.Repeat([]byte{255}, requestSize))
	f.Add(append(request{treehash.Hash{1}, 1 << 20, wantChunk, 0}.append(nil)[:41], 255, 255, 255, 255))
	f.Fuzz(func(t *testing.T, b []byte) {
		const maxSize = 1 << 30
		r, err := decodeRequest(b, maxSize)
		if err != nil {
			return
		}
		chunks := treehash.NumChunks(r.size)
		if r.size < 1 || r.size > maxSize || r.n < 0 || r.n > chunks || r.n == chunks && r.kind != wantHoldings {
			t.Fatalf("%+v", r)
		}
		if !bytes.Equal(r.append(nil), b) {
			t.Fatal("a request does not encode to what it came from")
		}
	})
}

func FuzzHoldings(f *testing.F) {
	f.Add([]byte{255, 3}, 10)
	f.Add([]byte{255, 7}, 10)
	f.Add([]byte{1}, 1)
	f.Add([]byte{}, 0)
	f.Fuzz(func(t *testing.T, b []byte, chunks int) {
		if chunks < 1 || chunks > 1<<20 {
			return // the size of a body says it, and that was checked
		}
		has, count, err := decodeHoldings(b, chunks)
		if err != nil {
			return
		}
		n := 0
		for i := range len(has) * 8 {
			if has.has(i) {
				n++
				if i >= chunks {
					t.Fatalf("chunk %d of %d", i, chunks)
				}
			}
		}
		if n != count {
			t.Fatalf("%d chunks, not %d", n, count)
		}
	})
}

func FuzzAcceptHead(f *testing.F) {
	f.Add(openerHead(messageProtocol))
	f.Add(openerHead("/other"))
	f.Add([]byte(multistreamToken + "\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		rw := struct {
			io.Reader
			io.Writer
		}{bytes.NewReader(b), io.Discard}
		if got, err := acceptHead(rw, messageProtocol, bodyProtocol); err == nil && !bytes.HasPrefix(b, openerHead(got)) {
			t.Fatalf("%q taken for %s", b, got)
		}
	})
}

func FuzzParseAddress(f *testing.F) {
	for _, s := range []string{"127.0.0.1:80", "/ip4/1.2.3.4/tcp/5", "[::1%eth0]:1", "/dns/a/tcp/1/p2p/12D3KooWHuujKGhuC6Y9NYvi5wC6xnu5WFA9NuCbZbM7MMxVFYMw", "/tcp/1/p2p"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		addr, _, err := parseAddress(s)
		if err != nil {
			return
		}
		if again, _, err := parseAddress(addr.String()); err != nil || !again.Equal(addr) {
			t.Fatalf("%q: %v, then %v, %v", s, addr, again, err)
		}
	})
}

func FuzzKey(f *testing.F) {
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f\n-----END PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if key, err := parseKey(b); err == nil && len(key) != 64 {
			t.Fatalf("a key of %d bytes", len(key))
		}
	})
}

func TestHeadOfOtherProtocolIsAnswered(t *testing.T) {
	var out bytes.Buffer
	rw := struct {
		io.Reader
		io.Writer
	}{bytes.NewReader(openerHead("/ipfs/ping/1.0.0")), &out}
	if _, err := acceptHead(rw, bodyProtocol); err == nil || !strings.Contains(err.Error(), "/ipfs/ping/1.0.0") {
		t.Errorf("error %v", err)
	}
	if got := out.String(); got != "\x13/multistream/1.0.0\n\x03na\n" {
		t.Errorf("answer %q", got)
	}
}

// TestKeptAgainstModel adds and forgets at random, beside a plain sorted list.
func TestKeptAgainstModel(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	const members, maxCount, maxBytes = 3, 5, 40
	var k kept
	k.init(maxCount, maxBytes, maxBytes)
	model := make([][]*keptMessage, members) // lowest first
	gone := map[*keptMessage]bool{}
	dropped := func(m *keptMessage) { gone[m] = true }
	floor := uint64(0)
	for step := range 5000 {
		if rng.IntN(20) == 0 {
			floor = max(floor, uint64(rng.IntN(step/50+1)))
			k.forget(floor, dropped)
			for i := range model {
				model[i] = slices.DeleteFunc(model[i], func(m *keptMessage) bool { return m.meta.Slot < floor })
			}
		}
		m := &keptMessage{data: make([]byte, 1+rng.IntN(20)), raw: rng.Uint64(), meta: Meta{From: rng.IntN(members), Slot: uint64(rng.IntN(step/50 + 10))}}
		binary.LittleEndian.PutUint64(m.meta.ID[:], rng.Uint64())
		wanted := k.wants(have{m.meta.ID, m.meta.From, m.meta.Slot, false})
		added := k.add(m, dropped)
		if added && !wanted {
			t.Fatalf("step %d: added what it does not ask for", step)
		}
		if m.meta.Slot >= floor {
			o := append(model[m.meta.From], m)
			slices.SortFunc(o, func(a, b *keptMessage) int {
				if a.below(b.meta.Slot, b.meta.ID) {
					return -1
				}
				return 1
			})
			for len(o) > maxCount || size(o) > maxBytes {
				low := o[0]
				o = o[1:]
				if low == m {
					break
				}
			}
			model[m.meta.From] = o
		}
		messages, total := 0, 0
		for i, o := range model {
			messages += len(o)
			total += size(o)
			got := k.of[keptKey{i, false}]
			if got == nil {
				got = &keptOf{}
			}
			if len(got.messages) != len(o) || got.bytes != size(o) {
				t.Fatalf("step %d: member %d has %d messages, %d bytes; want %d, %d", step, i, len(got.messages), got.bytes, len(o), size(o))
			}
			for _, m := range o {
				if k.byID[m.meta.ID] != m || k.byData[m.raw] != m || gone[m] {
					t.Fatalf("step %d: a message is lost", step)
				}
			}
		}
		if n, b := k.size(); n != messages || b != total || len(k.byData) != messages {
			t.Fatalf("step %d: %d messages, %d bytes; want %d, %d", step, n, b, messages, total)
		}
	}
	if k.add(&keptMessage{data: make([]byte, maxBytes+1), meta: Meta{Slot: 1 << 40}}, dropped) {
		t.Error("one message over all bytes was kept")
	}
}

func size(o []*keptMessage) (n int) {
	for _, m := range o {
		n += len(m.data)
	}
	return n
}

// TestFloodIsBounded: a member that signs without end fills no more than its
// own share of each peer's memory.
func TestFloodIsBounded(t *testing.T) {
	g := newGroup(t, 3)
	g.limits.KeptMessages = 20
	g.startAll()
	flooder, honest, other := g.peers[0], g.peers[1], g.peers[2]
	honest.says(1, "one honest word")
	other.hears("one honest word")
	for slot := range uint64(2000) {
		flooder.says(slot, fmt.Sprint("noise ", slot))
	}
	honest.hears("noise 1999")
	other.hears("noise 1999")
	for _, p := range g.peers {
		s := p.Stats()
		if s.KeptMessages != 21 || s.KeptBytes > 21*100 {
			t.Errorf("peer %d keeps %d messages, %d bytes", p.index, s.KeptMessages, s.KeptBytes)
		}
		p.Host.mu.Lock()
		for _, s := range p.sessions {
			if len(s.known) > 21 {
				t.Errorf("peer %d remembers %d messages of a session", p.index, len(s.known))
			}
		}
		p.Host.mu.Unlock()
	}
}

func TestLeafCacheIsBounded(t *testing.T) {
	b := bodyServer{leaves: make(map[treehash.Hash]*leafList)}
	computed := 0
	leaves := func(n int) func() []treehash.Hash {
		return func() []treehash.Hash { computed++; return make([]treehash.Hash, n) }
	}
	const n = cachedLeaves / 2
	for i := range byte(3) {
		for range 2 {
			if got := b.leavesOf(treehash.Hash{i}, n*treehash.ChunkSize, leaves(n)); len(got) != n {
				t.Fatalf("%d leaves", len(got))
			}
		}
	}
	if computed != 3 || b.total != cachedLeaves || len(b.leaves) != 2 || len(b.order) != 2 {
		t.Errorf("computed %d times; %d leaves of %d bodies kept", computed, b.total, len(b.leaves))
	}
	if got := b.leavesOf(treehash.Hash{9}, (cachedLeaves+1)*treehash.ChunkSize, leaves(cachedLeaves+1)); len(got) != cachedLeaves+1 || b.total > cachedLeaves {
		t.Errorf("%d leaves, %d kept", len(got), b.total)
	}
}

func TestReadFrameTellsTheEndFromACut(t *testing.T) {
	whole := appendFrame(nil, frameMessage, []byte("hello"))
	for n := range len(whole) {
		_, _, _, err := readFrame(bytes.NewReader(whole[:n]), 100, nil)
		want := io.ErrUnexpectedEOF
		if n == 0 {
			want = io.EOF
		}
		if !errors.Is(err, want) {
			t.Errorf("%d of %d bytes: %v", n, len(whole), err)
		}
	}
}

package membership

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var update = flag.Bool("update", false, "write the golden vectors again")

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func refused(t testing.TB, err error, says ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one that says %q", says)
	}
	for _, s := range says {
		if !strings.Contains(err.Error(), s) {
			t.Errorf("the error %q does not say %q", err, s)
		}
	}
}

// private returns the same key for the same number.
func private(n int) ed25519.PrivateKey {
	seed := make([]byte, ed25519.SeedSize)
	seed[0], seed[1] = byte(n), byte(n>>8)
	return ed25519.NewKeyFromSeed(seed)
}

func public(n int) ed25519.PublicKey { return private(n).Public().(ed25519.PublicKey) }

const adminKey = 60000 // admins have the keys from here on

func genesisOf(admins, k int) *Genesis {
	g := &Genesis{Arithmetic: 1, Job: []byte(`{"job":"a test"}`), K: uint8(k), CheckpointEvery: 64, Nonce: [16]byte{7}}
	for i := range admins {
		g.Admins = append(g.Admins, public(adminKey+i))
	}
	return g
}

func sign(t testing.TB, g *Genesis, r *Roster) *Roster {
	t.Helper()
	for i := range int(g.K) {
		check(t, r.Sign(g, private(adminKey+i)))
	}
	return r
}

// first is a signed Start roster of so many members.
func first(t testing.TB, g *Genesis, members int) *Roster {
	t.Helper()
	r := g.First()
	r.Start, r.F = true, uint16(MaxFaulty(members))
	for i := range members {
		r.Add(Member{Key: public(i), Name: fmt.Sprintf("peer %d", i+1)})
	}
	return sign(t, g, r)
}

func inviteOf(t testing.TB, g *Genesis) *Invite {
	t.Helper()
	i := &Invite{Expiry: time.Unix(1800000000, 0), Uses: 3, Nonce: [8]byte{1, 2}, Contacts: []Contact{
		{Key: public(0), Addresses: []string{"192.168.178.20:7000", "[fd00::1234:5678]:7000"}},
		{Key: public(1), Addresses: []string{"laptop.local:7000"}},
	}}
	check(t, i.Sign(g, private(adminKey)))
	return i
}

func TestGenesis(t *testing.T) {
	g := genesisOf(3, 2)
	got, err := DecodeGenesis(g.Encode())
	check(t, err)
	if !reflect.DeepEqual(got, g) || got.ID() != g.ID() {
		t.Errorf("%+v became %+v", g, got)
	}
	for want, harm := range map[string]func(*Genesis){
		"0 admin keys":        func(g *Genesis) { g.Admins = nil },
		"17 admin keys":       func(g *Genesis) { *g = *genesisOf(17, 2) },
		"0 of 3":              func(g *Genesis) { g.K = 0 },
		"4 of 3":              func(g *Genesis) { g.K = 4 },
		"stands twice":        func(g *Genesis) { g.Admins[2] = g.Admins[0] },
		"a job of 0 bytes":    func(g *Genesis) { g.Job = nil },
		"a job of 65536":      func(g *Genesis) { g.Job = make([]byte, 64<<10) },
		"checkpoint every 0":  func(g *Genesis) { g.CheckpointEvery = 0 },
		"every 9999999 heigh": func(g *Genesis) { g.CheckpointEvery = 9999999 },
	} {
		g := genesisOf(3, 2)
		harm(g)
		refused(t, g.Validate(), want)
		if len(g.Encode()) <= MaxGenesisBytes {
			_, err := DecodeGenesis(g.Encode())
			refused(t, err, want)
		}
	}
}

// Every field is part of the name of what it is in, and of the encoding.
func TestNamesDiffer(t *testing.T) {
	seen := map[Hash]string{}
	note := func(what string, h Hash) {
		if other, ok := seen[h]; ok {
			t.Errorf("%s has the name of %s", what, other)
		}
		seen[h] = what
	}
	for what, change := range map[string]func(*Genesis){
		"genesis":       func(*Genesis) {},
		"arithmetic":    func(g *Genesis) { g.Arithmetic++ },
		"job":           func(g *Genesis) { g.Job[0]++ },
		"an admin":      func(g *Genesis) { g.Admins[0] = public(1) },
		"admin more":    func(g *Genesis) { g.Admins = append(g.Admins, public(1)) },
		"k":             func(g *Genesis) { g.K-- },
		"checkpoint":    func(g *Genesis) { g.CheckpointEvery++ },
		"genesis nonce": func(g *Genesis) { g.Nonce[15]++ },
	} {
		g := genesisOf(3, 2)
		change(g)
		note(what, g.ID())
	}
	g := genesisOf(1, 1)
	for what, change := range map[string]func(*Roster){
		"roster":      func(*Roster) {},
		"roster job":  func(r *Roster) { r.Job[0]++ },
		"epoch":       func(r *Roster) { r.Epoch++ },
		"previous":    func(r *Roster) { r.Previous[0]++ },
		"start":       func(r *Roster) { r.Start = !r.Start },
		"emergency":   func(r *Roster) { r.Emergency = true },
		"f":           func(r *Roster) { r.F-- },
		"next":        func(r *Roster) { r.Next++ },
		"index":       func(r *Roster) { r.Members[3].Index++ },
		"key":         func(r *Roster) { r.Members[3].Key = public(9) },
		"name":        func(r *Roster) { r.Members[3].Name = "pi" },
		"minibatches": func(r *Roster) { r.Members[3].Minibatches = 1 },
		"private":     func(r *Roster) { r.Members[3].Private = true },
		"a member":    func(r *Roster) { r.Members = r.Members[:3] },
	} {
		r := first(t, g, 4)
		change(r)
		note(what, r.Hash())
	}
	a, b := first(t, g, 4), first(t, g, 4)
	a.Signatures = nil
	if a.Hash() != b.Hash() {
		t.Error("the name of a roster depends on who signed it")
	}
}

func TestChain(t *testing.T) {
	g := genesisOf(3, 2)
	c := NewChain(g)
	lobby := g.First()
	lobby.Add(Member{Key: public(0), Name: "first"})
	check(t, c.Add(sign(t, g, lobby)))
	if c.Start() != nil || c.Latest() != lobby {
		t.Error("the lobby is a start")
	}
	start := lobby.Successor()
	start.Start = true
	for i := 1; i < 4; i++ {
		start.Add(Member{Key: public(i)})
	}
	start.F = 1
	check(t, c.Add(sign(t, g, start)))
	check(t, c.Add(start)) // again

	next := func(change func(r *Roster)) *Roster {
		r := c.Latest().Successor()
		change(r)
		return sign(t, g, r)
	}
	check(t, c.Add(next(func(r *Roster) { r.Add(Member{Key: public(4), Name: "pi", Minibatches: 2}) })))
	check(t, c.Add(next(func(r *Roster) { r.Remove(1) })))
	check(t, c.Add(next(func(r *Roster) { r.Members[1].Key = public(5) })))
	check(t, c.Add(next(func(r *Roster) { r.Members[0].Minibatches, r.Members[2].Minibatches = 3, 4 })))
	check(t, c.Add(next(func(r *Roster) {
		r.Emergency = true
		r.Remove(3)
		r.Remove(4)
		r.Remove(2)
		r.Add(Member{Key: public(6)})
	})))
	if c.Start() != start || c.Len() != 7 {
		t.Errorf("%d rosters, start %v", c.Len(), c.Start())
	}
	last := c.Latest()
	if last.Epoch != 6 || len(last.Members) != 2 || last.Members[1].Index != 5 || last.Next != 6 {
		t.Errorf("%+v", last)
	}
	if keys := last.Keys(); len(keys) != 6 || !keys[0].Equal(public(0)) || keys[1] != nil || !keys[5].Equal(public(6)) {
		t.Errorf("keys %v", keys)
	}
	if m, ok := last.Member(5); !ok || !m.Key.Equal(public(6)) {
		t.Error("member 5 is not found")
	}
	if _, ok := last.Member(4); ok {
		t.Error("a removed member is found")
	}
	if !c.Was(public(2)) || c.Was(public(0)) || c.Was(public(99)) {
		t.Error("Was")
	}

	// A chain takes what another lists, in its order, also from its encoding.
	copied := NewChain(g)
	for _, r := range c.All() {
		again, err := DecodeRoster(r.Encode())
		check(t, err)
		if !reflect.DeepEqual(again, r) {
			t.Errorf("%+v became %+v", r, again)
		}
		check(t, copied.Add(again))
	}
	if copied.Latest().Hash() != last.Hash() {
		t.Error("the copy ends elsewhere")
	}
	if err := NewChain(g).Add(last); !errors.Is(err, ErrUnknownPrevious) {
		t.Errorf("a roster without the one before it: %v", err)
	}
}

// All choose alike where two rosters follow one.
func TestChainForks(t *testing.T) {
	g := genesisOf(1, 1)
	start := first(t, g, 4)
	var forks []*Roster
	for i := range 4 {
		r := start.Successor()
		r.Remove(uint16(i))
		forks = append(forks, sign(t, g, r))
	}
	further := forks[2].Successor()
	further.Add(Member{Key: public(8)})
	sign(t, g, further)
	want := Hash{}
	for _, order := range [][]int{{0, 1, 2, 3}, {3, 2, 1, 0}, {2, 0, 3, 1}} {
		c := NewChain(g)
		check(t, c.Add(start))
		for _, i := range order {
			check(t, c.Add(forks[i]))
		}
		got := c.Latest().Hash()
		if want == (Hash{}) {
			want = got
		}
		if got != want {
			t.Error("the order of arrival decides")
		}
		check(t, c.Add(further))
		if c.Latest() != further {
			t.Error("the longest chain does not count")
		}
	}
}

func TestChainRefuses(t *testing.T) {
	g := genesisOf(2, 1)
	start := first(t, g, 4)
	left := start.Successor()
	left.Remove(3)
	sign(t, g, left)
	many := func(r *Roster) {
		r.Members = nil
		for i := range MaxMembers + 1 {
			r.Members = append(r.Members, Member{Index: uint16(i), Key: public(i)})
		}
	}
	for want, change := range map[string]func(r *Roster){
		"is of job":                                func(r *Roster) { r.Job[0]++ },
		"is not known here":                        func(r *Roster) { r.Previous[0]++ },
		"follows that of epoch 1":                  func(r *Roster) { r.Epoch++ },
		"has none before it":                       func(r *Roster) { r.Epoch = 0 },
		"has started under":                        func(r *Roster) { r.Start = true; r.Remove(0) },
		"there is no emergency":                    func(r *Roster) { r.Start, r.Emergency = true, true },
		"one thing changes at a time":              func(r *Roster) { r.Remove(0); r.Add(Member{Key: public(9)}) },
		"one thing changes at a time: ":            func(r *Roster) { r.F = 0 },
		"one thing changes at a time: one":         func(r *Roster) { r.Remove(0); r.Members[1].Minibatches = 7 },
		"one thing changes at a time: one m":       func(r *Roster) { r.Remove(0); r.Members[1].Key = public(9) },
		"one thing changes at a time: one me":      func(r *Roster) { r.Add(Member{Key: public(9)}); r.Add(Member{Key: public(10)}) },
		"more than its key or its share":           func(r *Roster) { r.Members[0].Name = "other" },
		"more than its key or its share has":       func(r *Roster) { r.Members[0].Private = true },
		"more than its key or its share has c":     func(r *Roster) { r.Members[0].Key, r.Members[0].Minibatches = public(9), 2 },
		"takes a new identity":                     func(r *Roster) { r.Add(Member{Key: public(3)}) },
		"was on the roster of epoch 0":             func(r *Roster) { r.Members[0].Key = public(3) },
		"stands twice":                             func(r *Roster) { r.Add(Member{Key: public(1)}) },
		"the next index is that of peer 5":         func(r *Roster) { r.Next++; r.Add(Member{Key: public(9)}) },
		"the next index is 4":                      func(r *Roster) { r.Remove(0); r.Next++ },
		"the next index is that of peer 5\x00":     func(r *Roster) { r.Members = append(r.Members, Member{Index: 3, Key: public(9)}) }, // peer 4 left
		"stands after":                             func(r *Roster) { slices.Reverse(r.Members) },
		"not given yet":                            func(r *Roster) { r.Members[2].Index = 4 },
		"f is 1, but 3":                            func(r *Roster) { r.F = 1 },
		"0 members":                                func(r *Roster) { r.Members, r.F = nil, 0 },
		"513 members":                              many,
		"is no text":                               func(r *Roster) { r.Members[0].Name = strings.Repeat("a", 33) },
		"may not be there":                         func(r *Roster) { r.Members[0].Name = "a\x1b[2J" },
		"at most 1024":                             func(r *Roster) { r.Next = 1025 },
		"at most 4096 rosters":                     func(r *Roster) { r.Epoch = MaxRosters },
		"the next index is that of peer 5\x00\x00": func(r *Roster) { r.Next = 6; r.Members = append(r.Members, Member{Index: 5, Key: public(9)}) },
	} {
		c := NewChain(g)
		check(t, c.Add(start))
		check(t, c.Add(left))
		r := left.Successor()
		change(r)
		s := Signature{} // Sign refuses what Validate refuses
		copy(s.Signature[:], ed25519.Sign(private(adminKey), r.content()))
		r.Signatures = []Signature{s}
		err := c.Add(r)
		refused(t, err, strings.TrimRight(want, "\x00"))
		if c.Len() != 2 {
			t.Errorf("%s: kept all the same", want)
		}
	}
}

// k of m admins must sign, each once, and nobody else.
func TestSignatures(t *testing.T) {
	g := genesisOf(4, 2)
	r := g.First()
	r.Add(Member{Key: public(0)})
	by := func(admins ...int) *Roster {
		r := *r
		r.Signatures = nil
		for _, a := range admins {
			check(t, r.Sign(g, private(adminKey+a)))
		}
		return &r
	}
	for name, c := range map[string]struct {
		r    *Roster
		says string
	}{
		"none":          {by(), "0 admins have signed"},
		"one":           {by(2), "1 admins have signed it, 2 must"},
		"one twice":     {by(2, 2), "1 admins have signed it, 2 must"},
		"two":           {by(3, 1), ""},
		"all":           {by(0, 1, 2, 3), ""},
		"out of order":  {func() *Roster { r := by(0, 1); slices.Reverse(r.Signatures); return r }(), "out of order"},
		"doubled":       {func() *Roster { r := by(0); r.Signatures = append(r.Signatures, r.Signatures[0]); return r }(), "out of order"},
		"another's":     {func() *Roster { r := by(0, 1); r.Signatures[1].Admin = 2; return r }(), "signature of admin 3"},
		"no such admin": {func() *Roster { r := by(0, 1); r.Signatures[1].Admin = 9; return r }(), "signature of admin 10"},
		"a bit":         {func() *Roster { r := by(0, 1, 2); r.Signatures[2].Signature[5] ^= 4; return r }(), "signature of admin 3"},
	} {
		err := NewChain(g).Add(c.r)
		if c.says == "" {
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
		} else if err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
	}
	refused(t, r.Sign(g, private(1)), "none of the job's admin keys")
}

func TestInvite(t *testing.T) {
	g := genesisOf(2, 1)
	now := time.Unix(1799999999, 0)
	i := inviteOf(t, g)
	s := i.String()
	if len(s) > MaxInvite || !strings.HasPrefix(s, "spirt1") || strings.ContainsAny(s, " +/=\n") {
		t.Errorf("%d characters: %s", len(s), s)
	}
	got, err := ParseInvite("  " + s + "\n")
	check(t, err)
	if !reflect.DeepEqual(got, i) {
		t.Errorf("%+v became %+v", i, got)
	}
	check(t, got.Verify(g, now))
	refused(t, got.Verify(g, now.Add(2*time.Second)), "expired on 15 January 2027", "ask for a new one")
	refused(t, got.Verify(genesisOf(1, 1), now), "is for job")
	other := *got
	other.Uses++
	refused(t, other.Verify(g, now), "not signed by an admin")
	other = *got
	other.Admin = 1
	refused(t, other.Verify(g, now), "not signed by an admin")
	other.Admin = 2
	refused(t, other.Verify(g, now), "not signed by an admin")

	// No part may be missing or changed.
	for at := range s {
		for _, bad := range []string{s[:at], s[:at] + s[at+1:], s[:at] + string(s[at]^1) + s[at+1:]} {
			if _, err := ParseInvite(bad); err == nil {
				t.Fatalf("harmed at %d it is accepted: %s", at, bad)
			}
		}
	}
	refused(t, new(Invite).Sign(g, private(3)), "none of the job's admin keys")
	refused(t, (&Invite{Uses: 1, Expiry: now}).Sign(g, private(adminKey)), "--listen")

	// What does not fit is left out, and what is left is signed.
	long := &Invite{Expiry: now, Uses: 1}
	for n := range 9 {
		long.Contacts = append(long.Contacts, Contact{Key: public(n), Addresses: []string{strings.Repeat("a", 60) + ":7000", "10.0.0.1:7000"}})
	}
	check(t, long.Sign(g, private(adminKey)))
	if n := len(long.String()); n > MaxInvite || n < MaxInvite-150 || len(long.Contacts) < 2 {
		t.Errorf("%d characters with %d contacts", n, len(long.Contacts))
	}
	got, err = ParseInvite(long.String())
	check(t, err)
	check(t, got.Verify(g, now))
}

func TestPetition(t *testing.T) {
	g := genesisOf(1, 1)
	i := inviteOf(t, g)
	for name, p := range map[string]*Petition{
		"join":  {Job: g.ID(), Kind: Join, Invite: i, Name: "laptop-2", Private: true, Minibatches: 3, From: 2},
		"leave": {Job: g.ID(), Kind: Leave},
		"rekey": {Job: g.ID(), Kind: Rekey},
	} {
		var old ed25519.PrivateKey
		if p.Kind == Rekey {
			old = private(2)
		}
		b, err := p.Sign(private(1), old)
		check(t, err)
		got, err := DecodePetition(b)
		check(t, err)
		if !reflect.DeepEqual(got, p) || !got.Key.Equal(public(1)) {
			t.Errorf("%s: %+v became %+v", name, p, got)
		}
		for at := range b {
			bad := bytes.Clone(b)
			bad[at] ^= 1
			if _, err := DecodePetition(bad); err == nil {
				t.Fatalf("%s: changed at byte %d it is accepted", name, at)
			}
		}
	}
	for want, p := range map[string]*Petition{
		"unknown kind":     {Kind: 9},
		"an invite":        {Kind: Join},
		"an invite bel":    {Kind: Leave, Invite: i},
		"an old key":       {Kind: Rekey},
		"for another job":  {Kind: Join, Invite: i},
		"more than":        {Kind: Leave, Minibatches: 1},
		"may not be there": {Job: g.ID(), Kind: Join, Invite: i, Name: "\n"},
	} {
		_, err := p.Sign(private(1), nil)
		refused(t, err, want)
	}
}

func TestAnswer(t *testing.T) {
	g := genesisOf(1, 1)
	start := first(t, g, 4)
	a := &Answer{Refused: "no", Pending: true, Genesis: g.Encode(), Rosters: [][]byte{start.Encode()}, More: true, Contacts: []Contact{{Key: public(1), Addresses: []string{"10.0.0.1:7000"}}}}
	got, err := DecodeAnswer(a.Encode())
	check(t, err)
	if !reflect.DeepEqual(got, a) {
		t.Errorf("%+v became %+v", a, got)
	}

	// However much there is to say, the answer is one that is accepted.
	big := Answer{Refused: strings.Repeat("é", 1000), Genesis: make([]byte, MaxGenesisBytes)}
	for range MaxRosters {
		big.Rosters = append(big.Rosters, make([]byte, 8<<10))
	}
	for n := range MaxMembers {
		c := Contact{Key: public(n)}
		for range maxAddresses {
			c.Addresses = append(c.Addresses, strings.Repeat("a", maxAddressBytes))
		}
		big.Contacts = append(big.Contacts, c)
	}
	got, err = DecodeAnswer(big.Encode())
	check(t, err)
	if !got.More || len(got.Rosters) < 300 || len(got.Contacts) < 200 || len(got.Refused) != maxReason {
		t.Errorf("%d rosters, %d contacts, a reason of %d bytes", len(got.Rosters), len(got.Contacts), len(got.Refused))
	}
	_, err = DecodeAnswer(Answer{Refused: "\x1b[2J"}.Encode())
	refused(t, err, "no text that could be shown")
}

// Random steps, right and wrong, against what a chain must hold to.
func TestChainProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := rapid.IntRange(1, 4).Draw(t, "admins")
		g := genesisOf(m, rapid.IntRange(1, m).Draw(t, "k"))
		c := NewChain(g)
		given := map[uint16]bool{} // indices of members that went
		keys := 0
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			r := g.First()
			if last := c.Latest(); last != nil {
				r = last.Successor()
			}
			changes := rapid.IntRange(0, 3).Draw(t, "changes")
			for range changes {
				some := len(r.Members) > 0
				switch what := rapid.IntRange(0, 3).Draw(t, "what"); {
				case what == 0 || !some:
					r.Add(Member{Key: public(keys), Minibatches: uint16(rapid.IntRange(0, 4).Draw(t, "share"))})
					keys++
				case what == 1:
					r.Remove(rapid.SampledFrom(r.Members).Draw(t, "who").Index)
				case what == 2:
					r.Members[rapid.IntRange(0, len(r.Members)-1).Draw(t, "who")].Key = public(keys)
					keys++
				case what == 3:
					r.Members[rapid.IntRange(0, len(r.Members)-1).Draw(t, "who")].Minibatches++
				}
			}
			started := c.Start() != nil
			r.Start = rapid.Bool().Draw(t, "start")
			r.Emergency = rapid.Bool().Draw(t, "emergency")
			signers := rapid.SliceOfNDistinct(rapid.IntRange(0, m-1), 0, m, rapid.ID).Draw(t, "signers")
			bad := false
			for _, s := range signers {
				bad = r.Sign(g, private(adminKey+s)) != nil || bad
			}
			err := c.Add(r)
			switch {
			case err != nil && c.Len() > 0 && c.Latest() == r:
				t.Fatal("refused and kept")
			case err != nil:
				continue
			case bad || len(signers) < int(g.K):
				t.Fatal("accepted without enough signatures")
			case started && changes > 1 && !r.Emergency && !weighsOnly(c, r):
				// several changes of one draw may come to one or none
				if n := steps(c, r); n > 1 {
					t.Fatalf("%d steps in one", n)
				}
			case started && r.Start:
				t.Fatal("started twice")
			}
			if c.Latest() != r {
				t.Fatal("accepted and not the latest")
			}
			before, _ := c.Get(r.Previous)
			if before != nil {
				for _, old := range before.Members {
					if _, ok := r.Member(old.Index); !ok {
						given[old.Index] = true
					}
				}
			}
			for _, now := range r.Members {
				if given[now.Index] {
					t.Fatalf("index %d was another's", now.Index)
				}
			}
			again, err := DecodeRoster(r.Encode())
			if err != nil || !reflect.DeepEqual(again.Hash(), r.Hash()) {
				t.Fatalf("decoded: %v", err)
			}
		}
	})
}

func weighsOnly(c *Chain, r *Roster) bool { return steps(c, r) == 0 }

// steps counts the members that came, went or changed their key.
func steps(c *Chain, r *Roster) (n int) {
	before, ok := c.Get(r.Previous)
	if !ok {
		return 0
	}
	for _, m := range r.Members {
		old, ok := before.Member(m.Index)
		if !ok || !old.Key.Equal(m.Key) {
			n++
		}
	}
	for _, m := range before.Members {
		if _, ok := r.Member(m.Index); !ok {
			n++
		}
	}
	return n
}

// The encodings must not change from one version to the next: who changes them
// changes the version, and these.
func TestGolden(t *testing.T) {
	const file = "testdata/golden.hex"
	g := genesisOf(2, 1)
	start := first(t, g, 4)
	next := start.Successor()
	next.Remove(2)
	sign(t, g, next)
	i := inviteOf(t, g)
	join, err := (&Petition{Job: g.ID(), Kind: Join, Invite: i, Name: "laptop-2", Minibatches: 3}).Sign(private(4), nil)
	check(t, err)
	rekey, err := (&Petition{Job: g.ID(), Kind: Rekey}).Sign(private(5), private(1))
	check(t, err)
	id, hash := g.ID(), next.Hash()
	answer := Answer{Genesis: g.Encode(), Rosters: [][]byte{start.Encode()}, Contacts: i.Contacts}
	var out strings.Builder
	out.WriteString("# What package membership encodes, in hexadecimal; the invite as its string.\n")
	for _, v := range []struct {
		name string
		data []byte
	}{
		{"genesis", g.Encode()}, {"job", id[:]}, {"roster of epoch 0", start.Encode()}, {"roster of epoch 1", next.Encode()},
		{"hash of that", hash[:]}, {"join", join}, {"rekey", rekey}, {"answer", answer.Encode()},
	} {
		fmt.Fprintf(&out, "\n# %s\n%s\n", v.name, hex.EncodeToString(v.data))
	}
	fmt.Fprintf(&out, "\n# invite\n%s\n", i)
	if *update {
		check(t, os.WriteFile(file, []byte(out.String()), 0o644))
	}
	want, err := os.ReadFile(file)
	check(t, err)
	if out.String() != string(want) {
		t.Errorf("the encodings are not those of %s:\n%s", file, out.String())
	}
}

func FuzzDecode(f *testing.F) {
	g := genesisOf(2, 1)
	start := first(f, g, 3)
	i := inviteOf(f, g)
	join, err := (&Petition{Job: g.ID(), Kind: Join, Invite: i, Name: "laptop-2"}).Sign(private(4), nil)
	check(f, err)
	rekey, err := (&Petition{Job: g.ID(), Kind: Rekey}).Sign(private(5), private(1))
	check(f, err)
	for _, b := range [][]byte{g.Encode(), start.Encode(), join, rekey, i.encode(), Answer{Genesis: g.Encode(), Rosters: [][]byte{start.Encode()}, Contacts: i.Contacts}.Encode()} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if v, err := DecodeGenesis(b); err == nil && !bytes.Equal(v.Encode(), b) {
			t.Error("a genesis has two encodings")
		}
		if v, err := DecodeRoster(b); err == nil {
			if !bytes.Equal(v.Encode(), b) {
				t.Error("a roster has two encodings")
			}
			if NewChain(g).Add(v) == nil && v.Hash() != start.Hash() {
				t.Error("a roster that nobody signed")
			}
		}
		if v, err := DecodePetition(b); err == nil && v.Invite != nil && v.Invite.Job != v.Job {
			t.Error("a petition with an invite for another job")
		}
		if v, err := DecodeInvite(b); err == nil && !bytes.Equal(v.encode(), b) {
			t.Error("an invite has two encodings")
		}
		if v, err := DecodeAnswer(b); err == nil && len(v.Rosters) > 0 && !bytes.Equal(v.Encode(), b) {
			t.Error("an answer has two encodings")
		}
	})
}

func FuzzParseInvite(f *testing.F) {
	f.Add(inviteOf(f, genesisOf(1, 1)).String())
	f.Add("spirt1")
	f.Add("spirt1AAAA")
	f.Fuzz(func(t *testing.T, s string) {
		i, err := ParseInvite(s)
		if err == nil && i.String() != strings.TrimSpace(s) {
			t.Errorf("an invite has two strings, %q and %q", s, i)
		}
	})
}

package membership

import (
	"cmp"
	"crypto/ed25519"
	"errors"
	"fmt"
	"slices"

	"github.com/spirt-ml/spirt/internal/treehash"
)

// Member is one peer of a job.
type Member struct {
	// Index is the member's for ever: it is never given to another. Sums go in
	// its order. People see Index+1.
	Index uint16
	// Key is the peer's identity.
	Key ed25519.PublicKey
	// Name is for people; it may be empty, and need not be unique.
	Name string
	// Minibatches is how many it computes in each round, and so its weight in
	// the average. 0: the job's number.
	Minibatches uint16
	// Private says that it trains on samples of its own, not on the job's.
	Private bool
}

// Roster is who takes part from some record on. A roster that was signed or
// added to a chain must not be changed.
type Roster struct {
	Job      Hash
	Epoch    uint64
	Previous Hash // of the roster before; zero in epoch 0
	// Start says that training starts under this roster: so does exactly one
	// of a chain.
	Start bool
	// Emergency says that this roster may differ from the one before in any
	// number of members, and needs no quorum of those.
	Emergency bool
	// F is how many Byzantine members it is laid out for, at most
	// MaxFaulty(len(Members)).
	F uint16
	// Next is the index that the next new member gets.
	Next    uint16
	Members []Member // by ascending Index
	// Signatures are by admins, ascending.
	Signatures []Signature
}

// Signature is an admin's over a roster without its signatures.
type Signature struct {
	Admin     uint8 // position in Genesis.Admins
	Signature [ed25519.SignatureSize]byte
}

type (
	wireMember struct {
		_           struct{} `cbor:",toarray"`
		Index       uint16
		Key         key
		Name        string
		Minibatches uint16
		Private     bool
	}
	wireRoster struct {
		_         struct{} `cbor:",toarray"`
		Version   uint64
		Job       Hash
		Epoch     uint64
		Previous  Hash
		Start     bool
		Emergency bool
		F         uint16
		Next      uint16
		Members   []wireMember
	}
	wireSignature struct {
		_         struct{} `cbor:",toarray"`
		Admin     uint8
		Signature [ed25519.SignatureSize]byte
	}
	wireSignedRoster struct {
		_          struct{} `cbor:",toarray"`
		Roster     wireRoster
		Signatures []wireSignature
	}
)

func (r *Roster) wire() *wireRoster {
	w := &wireRoster{
		Version: version, Job: r.Job, Epoch: r.Epoch, Previous: r.Previous, Start: r.Start,
		Emergency: r.Emergency, F: r.F, Next: r.Next, Members: []wireMember{},
	}
	for _, m := range r.Members {
		w.Members = append(w.Members, wireMember{Index: m.Index, Key: keyOf(m.Key), Name: m.Name, Minibatches: m.Minibatches, Private: m.Private})
	}
	return w
}

// content is what is signed and hashed.
func (r *Roster) content() []byte { return domain(rosterDomain, mustEncode(r.wire())) }

// Hash names the roster. It does not depend on who signed it.
func (r *Roster) Hash() Hash { return treehash.Sum(r.content()) }

// Encode returns the one encoding of a roster with its signatures.
func (r *Roster) Encode() []byte {
	w := wireSignedRoster{Roster: *r.wire(), Signatures: []wireSignature{}}
	for _, s := range r.Signatures {
		w.Signatures = append(w.Signatures, wireSignature{Admin: s.Admin, Signature: s.Signature})
	}
	return mustEncode(&w)
}

// DecodeRoster reads what Encode wrote and checks what can be checked without
// the chain; signatures are checked by Chain.Add.
func DecodeRoster(b []byte) (*Roster, error) {
	var w wireSignedRoster
	if err := decode(b, MaxRosterBytes, &w); err != nil {
		return nil, fmt.Errorf("roster: %w", err)
	}
	if err := checkVersion(w.Roster.Version); err != nil {
		return nil, fmt.Errorf("roster: %w", err)
	}
	v := &w.Roster
	r := &Roster{Job: v.Job, Epoch: v.Epoch, Previous: v.Previous, Start: v.Start, Emergency: v.Emergency, F: v.F, Next: v.Next}
	for _, m := range v.Members {
		r.Members = append(r.Members, Member{Index: m.Index, Key: m.Key.public(), Name: m.Name, Minibatches: m.Minibatches, Private: m.Private})
	}
	for _, s := range w.Signatures {
		r.Signatures = append(r.Signatures, Signature{Admin: s.Admin, Signature: s.Signature})
	}
	if err := r.Validate(); err != nil {
		return nil, fmt.Errorf("roster of epoch %d: %w", r.Epoch, err)
	}
	return r, nil
}

// Validate checks what can be checked of a roster alone.
func (r *Roster) Validate() error {
	switch n := len(r.Members); {
	case n < 1 || n > MaxMembers:
		return fmt.Errorf("%d members: 1 to %d are possible", n, MaxMembers)
	case r.Next > MaxIndices:
		return fmt.Errorf("it would be member number %d: a job has at most %d, start another", r.Next, MaxIndices)
	case int(r.F) > MaxFaulty(n):
		return fmt.Errorf("f is %d, but %d members tolerate at most %d Byzantine ones", r.F, n, MaxFaulty(n))
	case r.Epoch >= MaxRosters:
		return fmt.Errorf("epoch %d: a job has at most %d rosters, start another", r.Epoch, MaxRosters)
	case (r.Epoch == 0) != (r.Previous == Hash{}):
		return errors.New("the roster of epoch 0, and no other, has none before it")
	case r.Emergency && (r.Epoch == 0 || r.Start):
		return errors.New("before training starts there is no emergency")
	case len(r.Signatures) > MaxAdmins:
		return fmt.Errorf("%d signatures, more than %d", len(r.Signatures), MaxAdmins)
	}
	seen := make(map[key]bool, len(r.Members))
	for i, m := range r.Members {
		switch {
		case len(m.Key) != ed25519.PublicKeySize:
			return fmt.Errorf("the key of peer %d has %d bytes", int(m.Index)+1, len(m.Key))
		case i > 0 && r.Members[i-1].Index >= m.Index:
			return fmt.Errorf("peer %d stands after peer %d", int(m.Index)+1, int(r.Members[i-1].Index)+1)
		case m.Index >= r.Next:
			return fmt.Errorf("peer %d has an index that was not given yet", int(m.Index)+1)
		case seen[keyOf(m.Key)]:
			return fmt.Errorf("the key of peer %d stands twice", int(m.Index)+1)
		}
		if err := CheckName(m.Name); err != nil {
			return fmt.Errorf("peer %d: %w", int(m.Index)+1, err)
		}
		seen[keyOf(m.Key)] = true
	}
	for i, s := range r.Signatures {
		if i > 0 && r.Signatures[i-1].Admin >= s.Admin {
			return errors.New("its signatures are out of order")
		}
	}
	return nil
}

// Sign adds an admin's signature. A signature that this admin gave before is
// replaced.
func (r *Roster) Sign(g *Genesis, admin ed25519.PrivateKey) error {
	i, err := g.Admin(admin.Public().(ed25519.PublicKey))
	if err != nil {
		return err
	}
	r.Signatures = slices.DeleteFunc(r.Signatures, func(s Signature) bool { return int(s.Admin) == i })
	if err := r.Validate(); err != nil {
		return fmt.Errorf("roster of epoch %d: %w", r.Epoch, err)
	}
	s := Signature{Admin: uint8(i)}
	copy(s.Signature[:], ed25519.Sign(admin, r.content()))
	r.Signatures = append(r.Signatures, s)
	slices.SortFunc(r.Signatures, func(a, b Signature) int { return cmp.Compare(a.Admin, b.Admin) })
	return nil
}

// verify checks that K admins signed, and nobody else.
func (r *Roster) verify(g *Genesis) error {
	content := r.content()
	for _, s := range r.Signatures {
		if int(s.Admin) >= len(g.Admins) || !ed25519.Verify(g.Admins[s.Admin], content, s.Signature[:]) {
			return fmt.Errorf("the signature of admin %d is not right", int(s.Admin)+1)
		}
	}
	if n := len(r.Signatures); n < int(g.K) {
		return fmt.Errorf("%d admins have signed it, %d must", n, g.K)
	}
	return nil
}

// Successor returns a roster of the next epoch with the same members, to be
// changed and signed.
func (r *Roster) Successor() *Roster {
	return &Roster{
		Job: r.Job, Epoch: r.Epoch + 1, Previous: r.Hash(), F: r.F, Next: r.Next, Members: slices.Clone(r.Members),
	}
}

// Add gives the member the next index, which it returns, and adds it.
func (r *Roster) Add(m Member) uint16 {
	m.Index = r.Next
	r.Next++
	r.Members = append(r.Members, m)
	return m.Index
}

// Remove removes a member and lowers F to what the others tolerate. It
// reports whether there was such a member.
func (r *Roster) Remove(index uint16) bool {
	n := len(r.Members)
	r.Members = slices.DeleteFunc(r.Members, func(m Member) bool { return m.Index == index })
	r.F = min(r.F, uint16(MaxFaulty(len(r.Members))))
	return len(r.Members) < n
}

// Member returns the member with an index.
func (r *Roster) Member(index uint16) (Member, bool) {
	i, ok := slices.BinarySearchFunc(r.Members, index, func(m Member, index uint16) int { return cmp.Compare(m.Index, index) })
	if !ok {
		return Member{}, false
	}
	return r.Members[i], true
}

// Find returns the member with a key.
func (r *Roster) Find(public ed25519.PublicKey) (Member, bool) {
	i := slices.IndexFunc(r.Members, func(m Member) bool { return m.Key.Equal(public) })
	if i < 0 {
		return Member{}, false
	}
	return r.Members[i], true
}

// Keys returns the members' keys by index, nil where there is no member.
func (r *Roster) Keys() []ed25519.PublicKey {
	var keys []ed25519.PublicKey
	if n := len(r.Members); n > 0 {
		keys = make([]ed25519.PublicKey, int(r.Members[n-1].Index)+1)
	}
	for _, m := range r.Members {
		keys[m.Index] = m.Key
	}
	return keys
}

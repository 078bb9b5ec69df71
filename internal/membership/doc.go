// Package membership says who takes part in a job, and proves it: pure data
// and checks, no goroutine, clock, disk or socket.
//
// A [Genesis] is what never changes of a job; its hash is the job's ID. It
// names the admin keys, k of which sign each [Roster]: the members with their
// keys, names and shares of the work. Rosters form a hash chain, which [Chain]
// verifies. An [Invite] is a string that lets its holder send a [Petition] to
// become a member; the [Answer] brings genesis, rosters and addresses.
//
// To make a job: fill in a Genesis, [Genesis.First], Add the members, Sign. To
// change who takes part: Successor of the latest roster, change it, Sign. To
// follow: [NewChain] with a genesis whose ID is known, and Add every roster.
//
// Everything is CBOR in its core deterministic encoding; decoders refuse any
// other encoding of a value, bound every length, and check what can be
// checked of the value alone. docs/membership.md has the CDDL.
package membership

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"fmt"
	"unicode"
	"unicode/utf8"

	"github.com/fxamacker/cbor/v2"

	"github.com/spirt-ml/spirt/internal/treehash"
)

// Hash names jobs and rosters.
type Hash = treehash.Hash

// Bounds on what comes from outside.
const (
	// MaxMembers bounds a roster, MaxIndices the indices that one job ever
	// gives.
	MaxMembers = 512
	MaxIndices = 1024
	// MaxName bounds a member's name in bytes.
	MaxName = 32
	// MaxAdmins bounds the admin keys of a job.
	MaxAdmins = 16
	// MaxRosterBytes bounds an encoded roster, MaxGenesisBytes an encoded
	// genesis, MaxPetitionBytes a petition, and MaxAnswerBytes an answer.
	MaxRosterBytes   = 46 << 10
	MaxGenesisBytes  = 64 << 10
	MaxPetitionBytes = 16 << 10
	MaxAnswerBytes   = 4 << 20
	// MaxRosters bounds a chain: an admin key that signs without end fills no
	// memory.
	MaxRosters = 4096
	// MaxInvite bounds an invite's string in bytes.
	MaxInvite = 600

	maxAddresses    = 16
	maxAddressBytes = 256
	maxContacts     = MaxMembers
	maxReason       = 1024
)

const (
	genesisDomain  = "spirt/1 genesis\x00"
	rosterDomain   = "spirt/1 roster\x00"
	inviteDomain   = "spirt/1 invite\x00"
	petitionDomain = "spirt/1 petition\x00"
)

// version is that of the encodings.
const version = 1

// MaxFaulty returns how many Byzantine members a roster of n may be laid out
// for: floor((n-1)/3).
func MaxFaulty(n int) int { return max(0, (n-1)/3) }

type key [ed25519.PublicKeySize]byte

func (k *key) public() ed25519.PublicKey { return bytes.Clone(k[:]) }

func keyOf(public ed25519.PublicKey) (k key) {
	copy(k[:], public)
	return k
}

var encoding, decoding = cborModes()

func cborModes() (cbor.EncMode, cbor.DecMode) {
	enc, err := cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		panic(err)
	}
	dec, err := cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		MaxNestedLevels:   8,
		MaxArrayElements:  MaxRosters,
		MaxMapPairs:       16,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
	}.DecMode()
	if err != nil {
		panic(err)
	}
	return enc, dec
}

// mustEncode encodes a value of this package's own wire types, which cannot
// fail.
func mustEncode(v any) []byte {
	b, err := encoding.Marshal(v)
	if err != nil {
		panic("membership: encoding: " + err.Error())
	}
	return b
}

// decode reads the one encoding of a wire value.
func decode(b []byte, limit int, w any) error {
	if len(b) > limit {
		return fmt.Errorf("%d bytes, more than %d", len(b), limit)
	}
	if err := decoding.Unmarshal(b, w); err != nil {
		return err
	}
	if !bytes.Equal(mustEncode(w), b) {
		return errors.New("not in canonical form")
	}
	return nil
}

func checkVersion(v uint64) error {
	if v != version {
		return fmt.Errorf("its format has version %d, this program knows %d: take the same version of spirt as the others", v, version)
	}
	return nil
}

func domain(d string, b []byte) []byte { return append([]byte(d), b...) }

// CheckName returns an error unless s may be a member's name: empty, or
// printable text of at most MaxName bytes without spaces at its ends.
func CheckName(s string) error {
	if len(s) > MaxName || !utf8.ValidString(s) {
		return fmt.Errorf("the name %.40q is no text of at most %d bytes", s, MaxName)
	}
	for i, r := range s {
		if !unicode.IsPrint(r) || r == ' ' && (i == 0 || i == len(s)-1) {
			return fmt.Errorf("the name %q has a character at byte %d that may not be there", s, i)
		}
	}
	return nil
}

func checkAddresses(list []string) error {
	if len(list) > maxAddresses {
		return fmt.Errorf("%d addresses, more than %d", len(list), maxAddresses)
	}
	for _, a := range list {
		if a == "" || len(a) > maxAddressBytes || !utf8.ValidString(a) {
			return fmt.Errorf("the address %.80q is no text of 1 to %d bytes", a, maxAddressBytes)
		}
	}
	return nil
}

// list gives nil and empty lists one encoding.
func list[T any](s []T) []T { return append(make([]T, 0, len(s)), s...) }

// printable reports whether text from outside may go to a terminal.
func printable(s string) bool {
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return false
		}
	}
	return utf8.ValidString(s)
}

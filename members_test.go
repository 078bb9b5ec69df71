package spirt

import (
	"bytes"
	"crypto/ed25519"
	"github.com/spirt-ml/spirt/events"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spirt-ml/spirt/internal/membership"
	"github.com/spirt-ml/spirt/p2p"
)

// aJob makes the folder of a job for several machines and the admin of it.
func aJob(t testing.TB, peers int) (dir string, job Job, a *admin) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "home")
	made := Job{Peers: peers, Model: "logistic", Rounds: 10, BatchesPerRound: 4, Speed: 100}
	check(t, CreateJob(t.Context(), made, JobConfig{Dir: dir, Name: "first", Listen: "127.0.0.1:0"}))
	job, rosters, err := loadJob(dir)
	check(t, err)
	a, err = openAdmin(dir, job, rosters)
	check(t, err)
	return dir, job, a
}

func inviteTo(t testing.TB, dir string, uses int) *membership.Invite {
	t.Helper()
	s, err := NewInvite(dir, uses, time.Hour)
	check(t, err)
	i, err := membership.ParseInvite(s)
	check(t, err)
	return i
}

func newcomer(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	key, err := p2p.NewKey()
	check(t, err)
	return key
}

// joining returns a petition of a newcomer and who sends it.
func joining(t testing.TB, i *membership.Invite, key ed25519.PrivateKey, name string) (p2p.PeerID, []byte) {
	t.Helper()
	p := membership.Petition{Job: i.Job, Kind: membership.Join, Invite: i, Name: name, Minibatches: 3}
	b, err := p.Sign(key, nil)
	check(t, err)
	id, err := p2p.ID(key.Public().(ed25519.PublicKey))
	check(t, err)
	return id, b
}

func desk(a *admin) *petitions {
	return &petitions{rosters: a.rosters, admin: a, now: time.Now, contacts: func() []membership.Contact { return nil }}
}

// Petitions of newcomers: who is admitted, as what, and who is not.
func TestPetitions(t *testing.T) {
	dir, job, a := aJob(t, 3)
	s := desk(a)
	i := inviteTo(t, dir, 2)
	second := newcomer(t)
	id, petition := joining(t, i, second, "second")
	answer := func(id p2p.PeerID, petition []byte) membership.Answer {
		t.Helper()
		got, err := s.answer(id, petition)
		check(t, err)
		return got
	}
	for range 2 { // asked again, as after a lost answer, it is no second use
		got := answer(id, petition)
		if got.Refused != "" || got.Pending || len(got.Rosters) != 2 || !bytes.Equal(got.Genesis, a.rosters.genesis.Encode()) {
			t.Fatalf("%+v", got)
		}
	}
	latest, start := a.rosters.latest()
	if m := latest.Members[1]; start != nil || m.Name != "second" || m.Minibatches != 3 || m.Index != 1 {
		t.Errorf("%+v", latest)
	}

	third := newcomer(t)
	id3, taken := joining(t, i, third, "second")
	if got := answer(id3, taken); !strings.Contains(got.Refused, `"second" is taken`) {
		t.Errorf("%+v", got)
	}
	_, petition = joining(t, i, third, "third")
	if _, err := s.answer(id, petition); err == nil {
		t.Error("a petition that another peer sends is taken")
	}
	answer(id3, petition)
	latest, start = a.rosters.latest()
	if start != latest || len(latest.Members) != 3 || latest.F != 0 {
		t.Errorf("with the last member training does not start: %+v", latest)
	}

	fourth := newcomer(t)
	id4, petition4 := joining(t, i, fourth, "")
	if got := answer(id4, petition4); !strings.Contains(got.Refused, "was used 2 times") {
		t.Errorf("%+v", got)
	}
	again, err := openRosters(dir) // what was counted is on disk
	check(t, err)
	other, err := openAdmin(dir, job, again)
	check(t, err)
	if got, err := desk(other).answer(id4, petition4); err != nil || !strings.Contains(got.Refused, "was used 2 times") {
		t.Errorf("%+v, %v", got, err)
	}
	s.now = func() time.Time { return time.Now().Add(2 * time.Hour) }
	if got := answer(id4, petition4); !strings.Contains(got.Refused, "expired") {
		t.Errorf("%+v", got)
	}
	s.now = time.Now
	otherDir, _, _ := aJob(t, 2)
	_, foreign := joining(t, inviteTo(t, otherDir, 1), fourth, "")
	_, err = s.answer(id4, foreign)
	refused(t, err, "for another job")
	_, err = s.answer(id4, []byte("petition"))
	refused(t, err, "petition")

	// A member leaves; its identity does not come back.
	leave := membership.Petition{Job: i.Job, Kind: membership.Leave}
	b, err := leave.Sign(second, nil)
	check(t, err)
	for range 2 {
		answer(id, b)
	}
	latest, _ = a.rosters.latest()
	if _, ok := latest.Find(leave.Key); ok || latest.Epoch != 3 {
		t.Errorf("%+v", latest)
	}
	_, back := joining(t, inviteTo(t, dir, 1), second, "back")
	if got := answer(id, back); !strings.Contains(got.Refused, "has left the job or was expelled") {
		t.Errorf("%+v", got)
	}

	// Another takes a new key, which only the old one can ask for.
	next := newcomer(t)
	rekey := membership.Petition{Job: i.Job, Kind: membership.Rekey}
	b, err = rekey.Sign(next, third)
	check(t, err)
	for range 2 {
		answer(id3, b)
	}
	latest, _ = a.rosters.latest()
	if m, ok := latest.Find(rekey.Key); !ok || m.Index != 2 || m.Name != "third" || latest.Epoch != 4 {
		t.Errorf("%+v", latest)
	}
	b, err = (&membership.Petition{Job: i.Job, Kind: membership.Rekey}).Sign(newcomer(t), fourth)
	check(t, err)
	if got := answer(id4, b); !strings.Contains(got.Refused, "no member's") {
		t.Errorf("%+v", got)
	}
}

// A peer without the admin key passes on what only an admin decides, answers
// members itself, and tells strangers nothing.
func TestPetitionsWithoutAdmin(t *testing.T) {
	dir, _, a := aJob(t, 3)
	var relayed [][]byte
	s := desk(a)
	s.admin, s.relay = nil, func(b []byte) { relayed = append(relayed, b) }
	i := inviteTo(t, dir, 1)
	key := newcomer(t)
	id, petition := joining(t, i, key, "new")
	got, err := s.answer(id, petition)
	check(t, err)
	if !got.Pending || len(relayed) != 1 || !bytes.Equal(relayed[0], petition) {
		t.Errorf("%+v, relayed %d", got, len(relayed))
	}
	p, err := membership.DecodePetition(relayed[0])
	check(t, err)
	check(t, a.grant(p, time.Now()))
	if got, err = s.answer(id, petition); err != nil || got.Pending || len(got.Rosters) != 2 || len(relayed) != 1 {
		t.Errorf("%+v, %v", got, err)
	}
	stranger := newcomer(t)
	strangerID, err := p2p.ID(stranger.Public().(ed25519.PublicKey))
	check(t, err)
	for _, kind := range []membership.Kind{membership.Follow} {
		b, err := (&membership.Petition{Job: i.Job, Kind: kind}).Sign(stranger, nil)
		check(t, err)
		_, err = s.answer(strangerID, b)
		refused(t, err, "no member of the job")
	}
	// An invite that nobody signed opens nothing, and is not passed on.
	forged := *i
	forged.Uses++
	_, b := joining(t, &forged, stranger, "")
	if got, err := s.answer(strangerID, b); err != nil || !strings.Contains(got.Refused, "not signed by an admin") || len(got.Genesis) != 0 || len(relayed) != 1 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestShareOf(t *testing.T) {
	job := Job{BatchesPerRound: 8, Speed: 100}
	for speed, want := range map[float64]uint16{100: 8, 12: 1, 0.1: 1, 50: 4, 68: 5, 300: 24, 1e9: 32} {
		if got := shareOf(speed, job); got != want {
			t.Errorf("at %v minibatches a second: %d, want %d", speed, got, want)
		}
	}
}

// The job's share is no more than an admin's peer grants.
func TestAdmitBoundsShares(t *testing.T) {
	dir, _, a := aJob(t, 3)
	i := inviteTo(t, dir, 1)
	p := membership.Petition{Job: i.Job, Kind: membership.Join, Invite: i, Minibatches: 60000}
	b, err := p.Sign(newcomer(t), nil)
	check(t, err)
	got, err := membership.DecodePetition(b)
	check(t, err)
	check(t, a.grant(got, time.Now()))
	latest, _ := a.rosters.latest()
	if m := latest.Members[1]; m.Minibatches != 16 {
		t.Errorf("%+v", m)
	}
}

// The admins of two processes take turns: no roster is lost.
func TestAdminsTakeTurns(t *testing.T) {
	dir, job, _ := aJob(t, 64)
	i := inviteTo(t, dir, 64)
	const each = 6
	errs := make(chan error)
	var requests []*membership.Petition
	for range 4 * each {
		_, b := joining(t, i, newcomer(t), "")
		p, err := membership.DecodePetition(b)
		check(t, err)
		requests = append(requests, p)
	}
	for part := range slices.Chunk(requests, each) {
		go func() {
			rosters, err := openRosters(dir)
			if err == nil {
				var a *admin
				a, err = openAdmin(dir, job, rosters)
				for _, p := range part {
					if err == nil {
						err = a.grant(p, time.Now())
					}
				}
			}
			errs <- err
		}()
	}
	for range 4 {
		check(t, <-errs)
	}
	rosters, err := openRosters(dir)
	check(t, err)
	latest, _ := rosters.latest()
	if len(latest.Members) != 1+4*each || len(rosters.all()) != 1+4*each {
		t.Errorf("%d members after %d rosters", len(latest.Members), len(rosters.all()))
	}
}

func TestMembersAndChanges(t *testing.T) {
	dir, _, a := aJob(t, 3)
	i := inviteTo(t, dir, 2)
	for _, name := range []string{"second", "third"} {
		_, b := joining(t, i, newcomer(t), name)
		p, err := membership.DecodePetition(b)
		check(t, err)
		check(t, a.grant(p, time.Now()))
	}
	log, err := events.OpenLog(filepath.Join(dir, eventsFile))
	check(t, err)
	for _, e := range []Event{
		{Event: "peer", Peer: 2, By: 1, State: "connected"}, {Event: "round", Peer: 1, Round: 7, Members: []int{1, 2}},
		{Event: "peer", Peer: 2, By: 1, State: "lost"}, {Event: "peer", Peer: 9, By: 1, State: "lost"},
	} {
		check(t, log.Emit(e))
	}
	check(t, log.Close())
	m, err := Members(dir)
	check(t, err)
	if !m.Started || m.Epoch != 2 || len(m.Members) != 3 || !m.Members[0].Own || m.Members[0].Minibatches != 4 || len(m.Members[0].Addresses) != 1 ||
		m.Members[1].State != "lost" || m.Members[1].Seen == nil || m.Members[1].Round != 7 || m.Members[2].State != "" || m.Members[1].Minibatches != 3 {
		t.Errorf("%+v", m)
	}
	refused(t, Emergency(dir, nil), "--keep")
	refused(t, Emergency(dir, []string{"1", "second", "3"}), "whole roster")
	check(t, Emergency(dir, []string{"first", m.Members[2].ID}))
	rosters, err := openRosters(dir)
	check(t, err)
	if latest, _ := rosters.latest(); !latest.Emergency || len(latest.Members) != 2 || latest.Members[1].Name != "third" {
		t.Errorf("%+v", latest)
	}
	out, err := Expel(dir, "third")
	check(t, err)
	if out.Peer != 3 {
		t.Errorf("%+v", out)
	}
	_, err = Expel(dir, "third")
	refused(t, err, "no member")
	check(t, os.Remove(filepath.Join(dir, adminFile)))
	_, err = Expel(dir, "first")
	refused(t, err, adminFile, "only the machine that made the job")
}

// A key is replaced however often that is interrupted.
func TestTakeNewKey(t *testing.T) {
	dir := t.TempDir()
	first, err := createIdentity(dir)
	check(t, err)
	next := newcomer(t)
	check(t, p2p.WriteKey(filepath.Join(dir, nextKeyFile), next))
	member := membership.Member{Key: first.Public().(ed25519.PublicKey)}
	check(t, takeNewKey(dir, member)) // not signed yet
	if key, err := p2p.LoadKey(filepath.Join(dir, keyFile)); err != nil || !key.Equal(first) {
		t.Fatalf("the key is taken before the roster has it: %v", err)
	}
	member.Key = next.Public().(ed25519.PublicKey)
	check(t, os.Rename(filepath.Join(dir, keyFile), filepath.Join(dir, oldKeyFile))) // then it was interrupted
	for range 2 {
		check(t, takeNewKey(dir, member))
		key, err := p2p.LoadKey(filepath.Join(dir, keyFile))
		check(t, err)
		old, err := p2p.LoadKey(filepath.Join(dir, oldKeyFile))
		check(t, err)
		if !key.Equal(next) || !old.Equal(first) {
			t.Error("the keys are mixed up")
		}
	}
}

func TestAddresses(t *testing.T) {
	id, err := p2p.ID(newcomer(t).Public().(ed25519.PublicKey))
	check(t, err)
	got := dialable(id, []string{"10.0.0.1:7000", "[fd00::1]:7000", "pi.local:7000", "/ip4/10.0.0.2/tcp/1", "/ip4/10.0.0.2/tcp/1/p2p/12D3", "nothing"})
	end := "/p2p/" + string(id)
	want := []string{"/ip4/10.0.0.1/tcp/7000" + end, "/ip6/fd00::1/tcp/7000" + end, "/dns/pi.local/tcp/7000" + end, "/ip4/10.0.0.2/tcp/1" + end, "/ip4/10.0.0.2/tcp/1/p2p/12D3"}
	if !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if got := short(append(got[:3:3], "/ip4/127.0.0.1/tcp/7000"+end, "10.0.0.1:7000")); !slices.Equal(got, []string{"10.0.0.1:7000", "[fd00::1]:7000", "pi.local:7000"}) {
		t.Errorf("%q", got)
	}
	if got := short([]string{"/ip4/127.0.0.1/tcp/7000" + end}); !slices.Equal(got, []string{"127.0.0.1:7000"}) {
		t.Errorf("%q", got)
	}
	at, err := settings{Listen: "10.0.0.1:7000", Announce: []string{"home.example:7"}}.reachable()
	if err != nil || !slices.Equal(at, []string{"home.example:7", "10.0.0.1:7000"}) {
		t.Errorf("%q, %v", at, err)
	}
	at, err = settings{Listen: "0.0.0.0:7000"}.reachable()
	check(t, err)
	for _, a := range at {
		if !strings.HasSuffix(a, ":7000") || strings.HasPrefix(a, "0.0.0.0") {
			t.Errorf("%q", a)
		}
	}
	if len(at) == 0 {
		t.Error("a peer that listens everywhere is reachable nowhere")
	}
}

func FuzzPetitions(f *testing.F) {
	dir, _, a := aJob(f, 3)
	s := desk(a)
	id, b := joining(f, inviteTo(f, dir, 1), newcomer(f), "new")
	f.Add(b)
	f.Add([]byte{0x83})
	f.Fuzz(func(t *testing.T, data []byte) {
		answer, err := s.answer(id, data)
		if err == nil && !bytes.Equal(data, b) && answer.Refused == "" {
			t.Error("a petition that nobody signed is answered")
		}
	})
}

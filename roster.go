package spirt

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"

	"github.com/spirt-ml/spirt/internal/membership"
	"github.com/spirt-ml/spirt/internal/treehash"
	"github.com/spirt-ml/spirt/nn"
	"github.com/spirt-ml/spirt/p2p"
)

// arithmeticVersion changes with everything that changes a model's bits.
const arithmeticVersion = 2

// encodeJob returns what a genesis says of a job. Field order is fixed by the
// types, so that the JSON is the same everywhere.
func encodeJob(job Job, spec nn.Spec) ([]byte, error) {
	b, err := json.Marshal(struct {
		Job  Job
		Spec nn.Spec
	}{job, spec})
	if err != nil {
		return nil, fmt.Errorf("encoding the job: %w", err)
	}
	return b, nil
}

// jobOf returns the job of a genesis, which may come from outside.
func jobOf(g *membership.Genesis) (Job, error) {
	var said struct {
		Job  Job
		Spec json.RawMessage
	}
	if g.Arithmetic != arithmeticVersion {
		return Job{}, fmt.Errorf("the job has the arithmetic of version %d, this program that of %d: take the same version of spirt as the others", g.Arithmetic, arithmeticVersion)
	}
	if err := json.Unmarshal(g.Job, &said); err != nil {
		return Job{}, fmt.Errorf("the job in the genesis: %w", err)
	}
	job := said.Job
	if err := job.Resolve(); err != nil {
		return Job{}, fmt.Errorf("the job in the genesis: %w", err)
	}
	spec, err := nn.Builtin(job.Model)
	if err != nil {
		return Job{}, fmt.Errorf("the job in the genesis: model: %w", err)
	}
	again, err := encodeJob(job, spec)
	if err != nil {
		return Job{}, err
	}
	if !bytes.Equal(again, g.Job) {
		return Job{}, errors.New("the job in the genesis says something that this program does not know: take the same version of spirt as the others")
	}
	return job, nil
}

// newGenesis makes the genesis of a new job with one admin key.
func newGenesis(job Job, admin ed25519.PublicKey) (*membership.Genesis, error) {
	spec, err := nn.Builtin(job.Model)
	if err != nil {
		return nil, fmt.Errorf("model: %w", err)
	}
	g := &membership.Genesis{Arithmetic: arithmeticVersion, Admins: []ed25519.PublicKey{admin}, K: 1, CheckpointEvery: uint64(job.CheckpointEvery)}
	rand.Read(g.Nonce[:]) // never fails
	if g.Job, err = encodeJob(job, spec); err != nil {
		return nil, err
	}
	return g, g.Validate()
}

// createJob writes what all peers of a new job share into its folder: the
// genesis, and the job for people to read; and the admin key, which it returns.
func createJob(dir string, job Job) (*membership.Genesis, ed25519.PrivateKey, error) {
	admin, err := p2p.NewKey()
	if err != nil {
		return nil, nil, fmt.Errorf("making the admin key: %w", err)
	}
	g, err := newGenesis(job, admin.Public().(ed25519.PublicKey))
	if err != nil {
		return nil, nil, &UsageError{err}
	}
	if err := p2p.WriteKey(filepath.Join(dir, adminFile), admin); err != nil {
		return nil, nil, err
	}
	return g, admin, writeJob(dir, g, job)
}

// writeJob writes a job's genesis, and the job for people to read.
func writeJob(dir string, g *membership.Genesis, job Job) error {
	if err := writeYAML(filepath.Join(dir, jobFile), "The job, with every default filled in; what counts is the genesis.", job, 0o644); err != nil {
		return err
	}
	return writeFileAtomic(filepath.Join(dir, genesisFile), g.Encode(), 0o644)
}

// createIdentities makes a key for each peer of a new run, and the roster that
// they train under from the start.
func createIdentities(dir string, g *membership.Genesis, admin ed25519.PrivateKey, job Job) error {
	r := g.First()
	r.Start, r.F = true, uint16(job.Byzantine)
	for n := 1; n <= job.Peers; n++ {
		key, err := createIdentity(peerDir(dir, n))
		if err != nil {
			return fmt.Errorf("making peer %d: %w", n, err)
		}
		r.Add(membership.Member{Key: key.Public().(ed25519.PublicKey)})
	}
	if err := r.Sign(g, admin); err != nil {
		return err
	}
	return writeRoster(dir, r)
}

// createIdentity makes the folder of a peer with its key.
func createIdentity(dir string) (ed25519.PrivateKey, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	key, err := p2p.NewKey()
	if err != nil {
		return nil, err
	}
	return key, p2p.WriteKey(filepath.Join(dir, keyFile), key)
}

// writeRoster leaves a roster in a run folder.
func writeRoster(run string, r *membership.Roster) error {
	dir := filepath.Join(run, rostersDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return writeFileAtomic(filepath.Join(dir, fmt.Sprintf("%04d-%s", r.Epoch, r.Hash().Short())), r.Encode(), 0o644)
}

// rosters are a job's verified rosters: those in its folder, and those that
// come over the network, which it puts there. It is safe for concurrent use,
// also by several processes.
type rosters struct {
	run     string
	genesis *membership.Genesis
	job     treehash.Hash

	changed chan struct{} // holds a token when there may be a new one

	mu    sync.Mutex
	chain *membership.Chain
	keys  map[treehash.Hash][]ed25519.PublicKey
	read  map[string]bool // names of files
}

// openRosters reads the genesis and the rosters of a folder.
func openRosters(run string) (*rosters, error) {
	path := filepath.Join(run, genesisFile)
	b, err := readFile(path, membership.MaxGenesisBytes)
	if err != nil {
		return nil, fmt.Errorf("no job in %s: %w", run, err)
	}
	g, err := membership.DecodeGenesis(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	r := newRosters(run, g)
	_, err = r.rescan()
	return r, err
}

func newRosters(run string, g *membership.Genesis) *rosters {
	return &rosters{
		run: run, genesis: g, job: g.ID(), changed: make(chan struct{}, 1), chain: membership.NewChain(g),
		keys: map[treehash.Hash][]ed25519.PublicKey{}, read: map[string]bool{},
	}
}

// rescan reads the rosters that were put in the folder since, and returns them.
func (r *rosters) rescan() (found []*membership.Roster, err error) {
	entries, err := os.ReadDir(filepath.Join(r.run, rostersDir)) // sorted, so by epoch
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range entries {
		if r.read[e.Name()] || e.Name()[0] == '.' { // being written
			continue
		}
		path := filepath.Join(r.run, rostersDir, e.Name())
		b, err := readFile(path, membership.MaxRosterBytes)
		if err != nil {
			return found, err
		}
		roster, err := membership.DecodeRoster(b)
		if err != nil {
			return found, fmt.Errorf("%s: %w", path, err)
		}
		added, err := r.addLocked(roster)
		if err != nil {
			return found, fmt.Errorf("%s: %w", path, err)
		}
		r.read[e.Name()] = true
		if added {
			found = append(found, roster)
		}
	}
	return found, nil
}

// add verifies a roster, and keeps it in the folder too. It reports whether it
// was new.
func (r *rosters) add(roster *membership.Roster) (bool, error) {
	r.mu.Lock()
	added, err := r.addLocked(roster)
	r.mu.Unlock()
	if !added || err != nil {
		return false, err
	}
	return true, writeRoster(r.run, roster)
}

func (r *rosters) addLocked(roster *membership.Roster) (bool, error) {
	before := r.chain.Len()
	if err := r.chain.Add(roster); err != nil {
		return false, err
	}
	r.keys[roster.Hash()] = roster.Keys()
	select {
	case r.changed <- struct{}{}:
	default:
	}
	return r.chain.Len() > before, nil
}

// members returns the keys of a roster's members by index, nil where there is
// none, and whether the roster is known.
func (r *rosters) members(roster treehash.Hash) ([]ed25519.PublicKey, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	keys, ok := r.keys[roster]
	return keys, ok
}

// get returns a roster, nil if it is not known.
func (r *rosters) get(hash treehash.Hash) *membership.Roster {
	r.mu.Lock()
	defer r.mu.Unlock()
	roster, _ := r.chain.Get(hash)
	return roster
}

// latest returns the roster of the highest epoch, and the one that training
// starts under; nil where there is none.
func (r *rosters) latest() (latest, start *membership.Roster) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.chain.Latest(), r.chain.Start()
}

// all returns all rosters by ascending epoch.
func (r *rosters) all() []*membership.Roster {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.chain.All()
}

// training returns the roster that training starts under and those after it,
// by ascending epoch.
func (r *rosters) training() []*membership.Roster {
	r.mu.Lock()
	defer r.mu.Unlock()
	start := r.chain.Start()
	if start == nil {
		return nil
	}
	return slices.DeleteFunc(r.chain.All(), func(x *membership.Roster) bool { return x.Epoch < start.Epoch })
}

// identities is who takes part in which job.
type identities struct {
	key     ed25519.PrivateKey // this peer's own
	old     ed25519.PrivateKey // that it replaced, nil if none
	job     treehash.Hash      // names the job: the same at every peer of it
	roster  treehash.Hash      // that training starts under; zero before it is known
	rosters *rosters
}

// loadIdentities reads the key of peer n of a run, and checks that it is the
// one on the roster.
func loadIdentities(dir string, n int, rosters *rosters) (identities, error) {
	latest, start := rosters.latest()
	if latest == nil {
		return identities{}, fmt.Errorf("there is no roster in %s", filepath.Join(dir, rostersDir))
	}
	ids := identities{job: rosters.job, rosters: rosters}
	if start != nil {
		ids.roster = start.Hash()
	}
	if n < 1 || n > int(latest.Next) {
		return identities{}, fmt.Errorf("peer %d: the job has the peers 1 to %d", n, latest.Next)
	}
	m, ok := latest.Member(uint16(n - 1))
	if !ok {
		return identities{}, ErrLeft
	}
	own := peerDir(dir, n)
	err := takeNewKey(own, m)
	if err != nil {
		return identities{}, err
	}
	if ids.key, err = p2p.LoadKey(filepath.Join(own, keyFile)); err != nil {
		return identities{}, err
	}
	if !m.Key.Equal(ids.key.Public()) {
		return identities{}, fmt.Errorf("the key of peer %d is not the one in %s: it would be refused by the others", n, filepath.Join(dir, rostersDir))
	}
	if ids.old, err = p2p.LoadKey(filepath.Join(own, oldKeyFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return identities{}, err
	}
	return ids, nil
}

// loadJob reads the job of a run folder and its rosters. The job is that of the
// genesis; the job file must not say something else.
func loadJob(run string) (Job, *rosters, error) {
	rosters, err := openRosters(run)
	if err != nil {
		return Job{}, nil, err
	}
	job, err := jobOf(rosters.genesis)
	if err != nil {
		return Job{}, nil, err
	}
	path := filepath.Join(run, jobFile)
	read, err := LoadJob(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return Job{}, nil, err
	}
	if err == nil && read != job {
		return Job{}, nil, fmt.Errorf("%s says something else than the genesis beside it: a job is never changed; restore the job file, or remove it", path)
	}
	return job, rosters, nil
}

// peerAddresses returns the host:port of each peer: consecutive ports from
// first, or free ports of loopback where first is empty.
func peerAddresses(first string, peers int) ([]string, error) {
	out := make([]string, peers)
	if first == "" {
		for i := range out {
			out[i] = "127.0.0.1:0"
		}
		return out, nil
	}
	host, port, err := net.SplitHostPort(first)
	if err != nil {
		return nil, fmt.Errorf("listen address %q: %w: take host:port, such as 127.0.0.1:7000", first, err)
	}
	p, err := strconv.Atoi(port)
	if err != nil || p < 0 || p+peers-1 > 65535 {
		return nil, fmt.Errorf("listen address %q: the ports of %d peers do not fit in 0 to 65535", first, peers)
	}
	for i := range out {
		q := p
		if p != 0 {
			q += i
		}
		out[i] = net.JoinHostPort(host, strconv.Itoa(q))
	}
	return out, nil
}

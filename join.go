package spirt

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spirt-ml/spirt/dataset"
	"github.com/spirt-ml/spirt/internal/membership"
	"github.com/spirt-ml/spirt/p2p"
)

// JobConfig says how the first peer of a new job is made.
type JobConfig struct {
	// Dir is the folder of the job, which must not exist.
	Dir string
	// Name is the peer's, for people. It may be empty.
	Name string
	// Listen is the host:port that the peer listens on; port 0 takes a free
	// one, and keeps it. Default: 0.0.0.0:7000.
	Listen string
	// Announce are further addresses, host:port, at which others reach it, as
	// behind a router.
	Announce []string
}

// CreateJob makes a job: its genesis, its admin key, and this machine's peer
// as the first member. Training starts when there are job.Peers members.
func CreateJob(ctx context.Context, job Job, cfg JobConfig) error {
	if err := job.Resolve(); err != nil {
		return &UsageError{err}
	}
	job.Data = absoluteData(job.Data)
	model, data, err := job.open()
	if err != nil {
		return &UsageError{err}
	}
	if err := membership.CheckName(cfg.Name); err != nil {
		return &UsageError{err}
	}
	orString(&cfg.Listen, "0.0.0.0:7000")
	listen, err := fixedPort(cfg.Listen)
	if err != nil {
		return &UsageError{err}
	}
	if job.Speed == 0 {
		if job.Speed, err = measureSpeed(ctx, job, model.NumParams(), data); err != nil {
			return err
		}
	}
	if err := newFolder(cfg.Dir); err != nil {
		return err
	}
	g, admin, err := createJob(cfg.Dir, job)
	if err != nil {
		return err
	}
	key, err := createIdentity(peerDir(cfg.Dir, 1))
	if err != nil {
		return err
	}
	if err := (settings{Listen: listen, Announce: cfg.Announce}).write(peerDir(cfg.Dir, 1)); err != nil {
		return err
	}
	r := g.First()
	r.Add(membership.Member{Key: key.Public().(ed25519.PublicKey), Name: cfg.Name})
	r.Start = job.Peers == 1
	if err := r.Sign(g, admin); err != nil {
		return err
	}
	return writeRoster(cfg.Dir, r)
}

// measureTime is how long this machine's speed is measured.
const measureTime = time.Second

// measureSpeed returns how many minibatches of a job this machine computes a
// second with as many functions as the job has.
func measureSpeed(ctx context.Context, job Job, params int, data *dataset.Dataset) (float64, error) {
	model, _, err := job.open()
	if err != nil {
		return 0, err
	}
	train, _, _ := data.Split()
	rows := dataset.Range{Lo: train.Lo, Hi: train.Lo + min(job.BatchSize, train.Len())}
	x, labels := make([]float32, rows.Len()*data.Stride()), make([]int32, rows.Len())
	data.Floats(x, rows)
	for i, l := range data.Labels[rows.Lo:rows.Hi] {
		labels[i] = int32(l)
	}
	start := make([]float32, params)
	model.Init(start, job.Seed)
	var done atomic.Int64
	var wg sync.WaitGroup
	began := time.Now()
	for range min(job.Functions.Concurrency, runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			grad, ws := make([]float32, params), model.NewWorkspace(rows.Len())
			for n := 0; n == 0 || time.Since(began) < measureTime && ctx.Err() == nil; n++ {
				model.Gradient(grad, start, x, labels, ws)
				done.Add(1)
			}
		})
	}
	wg.Wait()
	return float64(done.Load()) / time.Since(began).Seconds(), ctx.Err()
}

// JoinConfig says how a machine joins a job.
type JoinConfig struct {
	// Invite is the string that `spirt invite` printed.
	Invite string
	// Dir is the folder of the peer; one of the same job is gone on with.
	// Default: spirt- and the beginning of the job's ID.
	Dir string
	// Name is the peer's, for people. It may be empty.
	Name string
	// Listen is the host:port that it listens on; port 0 takes a free one, and
	// keeps it. Default: 0.0.0.0:0.
	Listen string
	// Announce are further addresses at which others reach it.
	Announce []string
	// Data is a data set of its own, "idx:FOLDER". Default: the job's.
	Data string
	// Database is the URL of a database in another process. Default: one in
	// this process.
	Database string
	// Progress is told what is being done, in words. It may be nil.
	Progress func(text string)
}

// askEvery is how often a newcomer asks again while it waits for an admin, or
// for a peer of the invite; for that it waits so long at most.
const (
	askEvery    = 2 * time.Second
	askPatience = 20 * time.Second
)

// Join becomes a member of the job that an invite is for, and returns the
// folder and the number of the peer, to be run by RunPeer. Where that was done
// before it does nothing.
func Join(ctx context.Context, cfg JoinConfig) (dir string, n int, err error) {
	i, err := membership.ParseInvite(cfg.Invite)
	if err != nil {
		return "", 0, &UsageError{err}
	}
	if err := membership.CheckName(cfg.Name); err != nil {
		return "", 0, &UsageError{err}
	}
	orString(&cfg.Dir, "spirt-"+i.Job.Short())
	orString(&cfg.Listen, "0.0.0.0:0")
	if cfg.Progress == nil {
		cfg.Progress = func(string) {}
	}
	if rosters, err := openRosters(cfg.Dir); err == nil {
		if rosters.job != i.Job {
			return "", 0, &UsageError{fmt.Errorf("the folder %s is of job %s, the invite for %s: name another with --dir", cfg.Dir, rosters.job.Short(), i.Job.Short())}
		}
		if n, err := OwnPeer(cfg.Dir); err == nil {
			return cfg.Dir, n, nil
		}
	}
	if err := i.Fresh(time.Now()); err != nil {
		return "", 0, &UsageError{err}
	}
	j, err := newJoiner(cfg, i)
	if err != nil {
		return "", 0, err
	}
	n, err = j.join(ctx)
	return cfg.Dir, n, err
}

// joiner is a newcomer.
type joiner struct {
	cfg     JoinConfig
	invite  *membership.Invite
	dir     string // of the peer, until it has an index
	key     ed25519.PrivateKey
	rosters *rosters
	job     Job
	at      []string // addresses to ask
	book    addressBook
}

func newJoiner(cfg JoinConfig, i *membership.Invite) (*joiner, error) {
	j := &joiner{cfg: cfg, invite: i, dir: filepath.Join(cfg.Dir, peersDir, newPeerDir), book: addressBook{}}
	listen, err := fixedPort(cfg.Listen)
	if err != nil {
		return nil, &UsageError{err}
	}
	if j.key, err = p2p.LoadKey(filepath.Join(j.dir, keyFile)); errors.Is(err, os.ErrNotExist) {
		j.key, err = createIdentity(j.dir)
	}
	if err != nil {
		return nil, err
	}
	data := cfg.Data
	if data != "" {
		data = absoluteData(data)
	}
	j.learn(i.Contacts)
	return j, settings{Listen: listen, Announce: cfg.Announce, Data: data, Database: cfg.Database}.write(j.dir)
}

// learn notes where members may be reached.
func (j *joiner) learn(contacts []membership.Contact) {
	for _, c := range contacts {
		id, err := p2p.ID(c.Key)
		if err != nil || len(j.book) > maxPeers {
			continue // of no use
		}
		j.book[id] = c.Addresses
	}
	j.at = nil
	for id, at := range j.book {
		for _, a := range dialable(id, at) {
			if len(j.at) < 64 {
				j.at = append(j.at, a)
			}
		}
	}
}

// ask sends a petition and verifies what comes back.
func (j *joiner) ask(ctx context.Context, p membership.Petition) (*membership.Answer, error) {
	for {
		if j.rosters != nil {
			if latest, _ := j.rosters.latest(); latest != nil {
				p.From = latest.Epoch + 1
			}
		}
		p.Job, p.Invite = j.invite.Job, j.invite
		request, err := p.Sign(j.key, nil)
		if err != nil {
			return nil, err
		}
		reply, err := p2p.Ask(ctx, j.key, j.at, j.invite.Job, request)
		for end := time.Now().Add(askPatience); err != nil && time.Now().Before(end) && !strings.Contains(err.Error(), "it refused"); {
			if err := wait(ctx, askEvery); err != nil {
				return nil, ErrInterrupted
			}
			reply, err = p2p.Ask(ctx, j.key, j.at, j.invite.Job, request)
		}
		if err != nil {
			return nil, fmt.Errorf("no peer of the invite answers; is one of them running, and reachable from here? %w", err)
		}
		a, err := membership.DecodeAnswer(reply)
		if err != nil {
			return nil, err
		}
		if a.Refused != "" {
			return nil, fmt.Errorf("refused: %s", a.Refused)
		}
		if err := j.take(a); err != nil {
			return nil, fmt.Errorf("the peer that answered cannot be believed: %w", err)
		}
		if !a.More {
			return a, nil
		}
	}
}

// take verifies an answer and keeps what it brings.
func (j *joiner) take(a *membership.Answer) error {
	if j.rosters == nil {
		g, err := membership.DecodeGenesis(a.Genesis)
		if err != nil {
			return err
		}
		if g.ID() != j.invite.Job {
			return errors.New("its genesis is of another job")
		}
		if err := j.invite.Verify(g, time.Now()); err != nil {
			return err
		}
		if j.job, err = jobOf(g); err != nil {
			return err
		}
		if err := writeJob(j.cfg.Dir, g, j.job); err != nil {
			return err
		}
		j.rosters = newRosters(j.cfg.Dir, g)
		if _, err := j.rosters.rescan(); err != nil {
			return err
		}
	}
	for _, b := range a.Rosters {
		r, err := membership.DecodeRoster(b)
		if err == nil {
			_, err = j.rosters.add(r)
		}
		if err != nil {
			return err
		}
	}
	j.learn(a.Contacts)
	return j.book.write(j.dir)
}

func (j *joiner) join(ctx context.Context) (int, error) {
	j.cfg.Progress("asking a peer of the invite")
	if _, err := j.ask(ctx, membership.Petition{Kind: membership.Follow}); err != nil {
		return 0, err
	}
	model, data, err := j.job.open()
	if err != nil {
		return 0, fmt.Errorf("this machine cannot take part: %w", err)
	}
	if j.cfg.Data != "" {
		if _, err := j.job.openOwn(absoluteData(j.cfg.Data), model.Spec()); err != nil {
			return 0, err
		}
	}
	p := membership.Petition{Kind: membership.Join, Name: j.cfg.Name, Private: j.cfg.Data != ""}
	if j.job.Speed > 0 {
		j.cfg.Progress("measuring the speed of this machine")
		speed, err := measureSpeed(ctx, j.job, model.NumParams(), data)
		if err != nil {
			return 0, err
		}
		p.Minibatches = shareOf(speed, j.job)
		j.cfg.Progress(fmt.Sprintf("this machine computes %.3g minibatches a second, the first one %.3g: it takes %d a round", speed, j.job.Speed, p.Minibatches))
	}
	for waiting := false; ; {
		a, err := j.ask(ctx, p)
		if err != nil {
			return 0, err
		}
		latest, _ := j.rosters.latest()
		if m, ok := latest.Find(j.key.Public().(ed25519.PublicKey)); ok {
			n := int(m.Index) + 1
			// The index is known: the folder gets its name.
			return n, os.Rename(j.dir, peerDir(j.cfg.Dir, n))
		}
		if !a.Pending {
			return 0, errors.New("the peer that answered says neither yes nor no: ask for a new invite")
		}
		if !waiting {
			waiting = true
			j.cfg.Progress("waiting for a peer that has the admin key")
		}
		if err := wait(ctx, askEvery); err != nil {
			return 0, ErrInterrupted
		}
	}
}

// shareOf returns how many minibatches a round a machine of some speed takes: it
// takes as long for them as the job's first machine for its own.
func shareOf(speed float64, job Job) uint16 {
	n := float64(job.BatchesPerRound)*speed/job.Speed + 0.5
	return uint16(max(1, min(n, float64(maxShare*job.BatchesPerRound), 1<<16-1)))
}

// OwnPeer returns the number of the one peer whose folder is in a run folder.
func OwnPeer(run string) (int, error) {
	entries, err := os.ReadDir(filepath.Join(run, peersDir))
	if err != nil {
		return 0, fmt.Errorf("no peer in %s: %w", run, err)
	}
	own := 0
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if _, err := os.Stat(filepath.Join(peerDir(run, n), keyFile)); err != nil {
			continue
		}
		if own != 0 {
			return 0, &UsageError{fmt.Errorf("%s has several peers: say which one with --peer", run)}
		}
		own = n
	}
	if own == 0 {
		return 0, fmt.Errorf("no peer in %s: `spirt job create` makes a job, `spirt join` joins one", run)
	}
	return own, nil
}

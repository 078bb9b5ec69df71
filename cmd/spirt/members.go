package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/spirt-ml/spirt"
	"github.com/spirt-ml/spirt/p2p"
)

// exactly refuses another number of arguments than n, and says what is missing.
func exactly(n int, what string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) != n {
			return usage(fmt.Errorf("%s needs %s (see `%s --help`)", c.CommandPath(), what, c.CommandPath()))
		}
		return nil
	}
}

func jobCommand(stdout io.Writer) *cobra.Command {
	c := &cobra.Command{
		Use:   "job",
		Short: "Make a job that peers on other machines join",
		RunE:  func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	var flags jobFlags
	var cfg spirt.JobConfig
	create := &cobra.Command{
		Use:   "create DIR",
		Short: "Make a job with this machine as its first member",
		Long: "Create makes a folder with a new job: what is trained, the admin key that decides who takes\n" +
			"part, and this machine's peer. Training starts when --peers members have joined.\n\n" +
			"Keep a copy of DIR/admin.key where nobody else reads it.",
		Example: "  spirt job create --peers 4 --batches-per-round 8 home\n  spirt job create --job job.yaml home\n  spirt peer home          # runs this machine's peer\n  spirt invite --uses 3 home",
		Args:    exactly(1, "the folder to make"),
		RunE: func(c *cobra.Command, args []string) error {
			job, err := flags.job(c)
			if err != nil {
				return usage(err)
			}
			cfg.Dir = args[0]
			if err := spirt.CreateJob(c.Context(), job, cfg); err != nil {
				return flags.explain(err)
			}
			_, err = fmt.Fprintf(stdout, "made the job in %s; training starts when %d members are there\nnow run its peer:  spirt peer %s\nand invite others: spirt invite --uses %d %s\n",
				cfg.Dir, job.Peers, cfg.Dir, max(1, job.Peers-1), cfg.Dir)
			return err
		},
	}
	flags.add(create)
	f := create.Flags()
	f.StringVar(&flags.file, "job", "", "a job file, which says what the flags do not (see `spirt init --help`)")
	f.StringVar(&cfg.Name, "name", "", "name of this machine's peer, for people")
	f.StringVar(&cfg.Listen, "listen", "0.0.0.0:7000", "host:port to listen on; port 0 takes a free one and keeps it")
	f.StringSliceVar(&cfg.Announce, "announce", nil, "further host:port at which others reach this peer, as through a router")
	c.AddCommand(create)
	return c
}

func inviteCommand(stdout io.Writer) *cobra.Command {
	uses, expires := 1, 24*time.Hour
	var asJSON bool
	c := &cobra.Command{
		Use:   "invite DIR",
		Short: "Print an invite to a job, one string for a chat message",
		Long: "Invite prints a string with which others join the job: spirt join INVITE. Who has the string\n" +
			"may join until it expires or was used, so send it as you would send a password.",
		Example: "  spirt invite --uses 3 --expires 1h home",
		Args:    exactly(1, "the folder of a job"),
		RunE: func(c *cobra.Command, args []string) error {
			s, err := spirt.NewInvite(args[0], uses, expires)
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(stdout).Encode(map[string]any{"invite": s, "uses": uses, "expires": time.Now().Add(expires).UTC().Truncate(time.Second)})
			}
			_, err = fmt.Fprintln(stdout, s)
			return err
		},
	}
	c.Flags().IntVar(&uses, "uses", uses, "how many machines may join with it")
	c.Flags().DurationVar(&expires, "expires", expires, "how long it is good, such as 30m or 24h")
	c.Flags().BoolVar(&asJSON, "json", false, "write one JSON object")
	return c
}

func joinCommand(stderr io.Writer) *cobra.Command {
	var cfg spirt.JoinConfig
	var verbose, only bool
	c := &cobra.Command{
		Use:   "join INVITE",
		Short: "Join a job with an invite, and run this machine's peer",
		Long: "Join makes an identity, asks a peer of the invite for membership, checks the signatures of\n" +
			"all that it is told, and runs the peer until the job is finished. Where it was interrupted,\n" +
			"the same command goes on; so does `spirt peer DIR`.",
		Example: "  spirt join --name laptop-2 spirt1goZYICPn7BUxAbF...\n" +
			"  spirt join --data idx:~/scans --dir hospital-b spirt1goZYICPn7BUxAbF...   # trains on data that stays here",
		Args: exactly(1, "an invite, the string that `spirt invite` printed"),
		RunE: func(c *cobra.Command, args []string) error {
			cfg.Invite = args[0]
			cfg.Progress = func(text string) { fmt.Fprintln(stderr, text) }
			dir, n, err := spirt.Join(c.Context(), cfg)
			if err != nil {
				return err
			}
			fmt.Fprintf(stderr, "this is peer %d of the job in %s\n", n, dir)
			if only {
				return nil
			}
			return runPeer(c.Context(), stderr, verbose, spirt.PeerConfig{Run: dir, Peer: n})
		},
	}
	f := c.Flags()
	f.StringVar(&cfg.Dir, "dir", "", "folder of the peer (default spirt-<job>)")
	f.StringVar(&cfg.Name, "name", "", "name of the peer, for people")
	f.StringVar(&cfg.Listen, "listen", "0.0.0.0:0", "host:port to listen on; port 0 takes a free one and keeps it")
	f.StringSliceVar(&cfg.Announce, "announce", nil, "further host:port at which others reach this peer, as through a router")
	f.StringVar(&cfg.Database, "db", "", "tensor database in another process: redis://, rediss:// or unix:// (default in the peer's own)")
	f.StringVar(&cfg.Data, "data", "", "train on data of this peer's own, as idx:FOLDER; it stays on this machine")
	f.BoolVar(&only, "only", false, "become a member and stop; the command peer runs it later")
	f.BoolVar(&verbose, "verbose", false, "log every action of the round protocol")
	return c
}

// runPeer runs a peer with its log on stderr.
func runPeer(ctx context.Context, stderr io.Writer, verbose bool, cfg spirt.PeerConfig) error {
	level := slog.LevelInfo
	if verbose {
		level = slog.LevelDebug
	}
	cfg.Logger = slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	p2p.LogLibrary(cfg.Logger.Handler())
	return spirt.RunPeer(ctx, cfg)
}

func peersCommand(stdout io.Writer) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:     "peers DIR",
		Short:   "List the members of a job",
		Example: "  spirt peers home\n  spirt peers --json home | jq '.members[].id'",
		Args:    exactly(1, "the folder of a job"),
		RunE: func(c *cobra.Command, args []string) error {
			info, err := spirt.Members(args[0])
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(stdout).Encode(info)
			}
			if !info.Started {
				fmt.Fprintf(stdout, "%d of %d members are there; training starts with the last\n", len(info.Members), info.Needed)
			}
			w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "PEER\tNAME\tSTATE\tROUND\tMINIBATCHES\tADDRESS\tID")
			for _, m := range info.Members {
				state := m.State
				if m.Own {
					state = "here"
				} else if m.Seen != nil {
					state += " " + time.Since(*m.Seen).Round(time.Second).String() + " ago"
				}
				share := fmt.Sprint(m.Minibatches)
				if m.Private {
					share += " own data"
				}
				fmt.Fprintf(w, "%d\t%s\t%s\t%d\t%s\t%s\t%s\n", m.Peer, m.Name, state, m.Round, share, strings.Join(m.Addresses[:min(1, len(m.Addresses))], ""), m.ID)
			}
			return w.Flush()
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "write one JSON object")
	return c
}

func expelCommand(stdout io.Writer) *cobra.Command {
	return &cobra.Command{
		Use:   "expel DIR PEER",
		Short: "Take a member off the roster",
		Long: "Expel signs a roster without the member, named by its number, name or ID. The running peer of\n" +
			"the folder tells the others; from the round on that agrees on it the member is turned away.\n" +
			"It cannot come back with the same identity. Change invites it may hold: they are still good.",
		Example: "  spirt expel home 3\n  spirt expel home laptop-2",
		Args:    exactly(2, "the folder of a job and a member"),
		RunE: func(c *cobra.Command, args []string) error {
			m, err := spirt.Expel(args[0], args[1])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(stdout, "peer %d is off the roster\n", m.Peer)
			return err
		},
	}
}

func leaveCommand(stdout, stderr io.Writer) *cobra.Command {
	return &cobra.Command{
		Use:     "leave DIR",
		Short:   "Take this machine's peer off the roster",
		Long:    "Leave asks those who hold an admin key to take this peer off the roster, so that the others do\nnot wait for it and count without it. A peer that only stops is waited for a little, and may return.",
		Example: "  spirt leave spirt-8f9ec1531016",
		Args:    exactly(1, "the folder of a peer"),
		RunE: func(c *cobra.Command, args []string) error {
			if err := spirt.Leave(c.Context(), args[0], func(s string) { fmt.Fprintln(stderr, s) }); err != nil {
				return err
			}
			_, err := fmt.Fprintln(stdout, "this peer is off the roster")
			return err
		},
	}
}

func rotateKeyCommand(stdout, stderr io.Writer) *cobra.Command {
	return &cobra.Command{
		Use:   "rotate-key DIR",
		Short: "Replace the key of this machine's peer",
		Long: "Rotate-key makes a new identity and has those who hold an admin key put it on the roster in\n" +
			"place of the old one. The peer keeps its number; if it runs, it goes on with the new key by itself.",
		Example: "  spirt rotate-key home",
		Args:    exactly(1, "the folder of a peer"),
		RunE: func(c *cobra.Command, args []string) error {
			if err := spirt.RotateKey(c.Context(), args[0], func(s string) { fmt.Fprintln(stderr, s) }); err != nil {
				return err
			}
			_, err := fmt.Fprintln(stdout, "the new key is on the roster")
			return err
		},
	}
}

func rosterCommand(stdout io.Writer) *cobra.Command {
	c := &cobra.Command{
		Use:   "roster",
		Short: "Change the roster in an emergency",
		RunE:  func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	var keep []string
	var yes int
	e := &cobra.Command{
		Use:   "emergency DIR",
		Short: "Sign a roster of the members that are left",
		Long: "Emergency signs a roster of only the members that --keep names, so that they can make\n" +
			"checkpoints final again when more than a third is gone for good.\n\n" +
			"The risk: if those left out are alive behind a broken network, both sides make different\n" +
			"things final, and one of them will lose its work. Make sure that they are gone. The command\n" +
			"asks for --yes twice.",
		Example: "  spirt roster emergency --keep 1,3 --yes --yes home",
		Args:    exactly(1, "the folder of a job"),
		RunE: func(c *cobra.Command, args []string) error {
			if yes < 2 {
				return usage(errors.New("an emergency roster can contradict what the members left out make final: only if they are gone for good, say --yes --yes"))
			}
			if err := spirt.Emergency(args[0], keep); err != nil {
				return err
			}
			_, err := fmt.Fprintf(stdout, "signed a roster of %d members\n", len(keep))
			return err
		},
	}
	e.Flags().StringSliceVar(&keep, "keep", nil, "members that are left, by number, name or ID")
	e.Flags().CountVar(&yes, "yes", "say it twice: the members left out are gone for good")
	c.AddCommand(e)
	return c
}

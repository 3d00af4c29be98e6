// Command sluice-fetch fetches images from registries for sluiced, which serves them and has no network itself.
//
// sluiced starts it. By hand it says what an image is like, and makes prefetch lists of traces. See docs/lazy-images.md.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/sluicefs/sluice/imagefetch"
)

//go:generate sh -c "go run . man >../../docs/man/sluice-fetch.1"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program whatever it does
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run is the program: 0 if all went well, 1 if something failed, 2 if the command line is wrong.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	status := 2
	root := command(stdin, stdout, stderr, &status)
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintf(stderr, "sluice-fetch: %v\n", err)
		return status
	}
	return 0
}

// command is the command line. status becomes 1 once a command has begun, whose error is not one of usage then.
func command(stdin io.Reader, stdout, stderr io.Writer, status *int) *cobra.Command {
	var logFormat, logLevel string
	var log *slog.Logger
	root := &cobra.Command{
		Use:   "sluice-fetch",
		Short: "Fetch images from registries for sluiced",
		Long: `Fetches images from registries for sluiced, which starts it: nobody needs to. Without a command it waits on a socket that it has
been given as a descriptor.

By hand it says what an image is like, with stat, and makes lists of what to fetch first, with prefetch-list.`,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(*cobra.Command, []string) (err error) {
			log, err = newLogger(stderr, logFormat, logLevel)
			if err == nil {
				*status = 1
			}
			return err
		},
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.PersistentFlags().StringVar(&logFormat, "log-format", "text", "the `format` of lines of the log: text or json")
	root.PersistentFlags().StringVar(&logLevel, "log-level", "info", "the `level` from which on something is logged: debug, info, warn or error")
	fd := root.Flags().Int("control-fd", 3, "the `descriptor` of the SOCK_SEQPACKET socket that images to open come from")
	root.RunE = func(cmd *cobra.Command, _ []string) error { return serveControl(cmd.Context(), *fd, log) }
	root.SetHelpCommand(&cobra.Command{Hidden: true}) // --help is enough
	root.AddCommand(statCommand(stdout, &log), prefetchListCommand(stdin, stdout), manCommand(stdout, root))
	return root
}

func newLogger(w io.Writer, format, level string) (*slog.Logger, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(level)); err != nil {
		return nil, fmt.Errorf("--log-level=%q is none: expected debug, info, warn or error", level)
	}
	o := &slog.HandlerOptions{Level: l}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(w, o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, o)), nil
	}
	return nil, fmt.Errorf("--log-format=%q is none: expected text or json", format)
}

func statCommand(stdout io.Writer, log **slog.Logger) *cobra.Command {
	var cfg imagefetch.Config
	var file string
	var asJSON bool
	c := &cobra.Command{
		Use:   "stat REFERENCE",
		Short: "Say what the layers of an image are, and whether they can be fetched in pieces",
		Long: `Says of each layer of an image, the lowest first, how large it is and whether it can be fetched in pieces.

REFERENCE is REGISTRY/REPO@sha256:DIGEST or REGISTRY/REPO:TAG; or http(s)://… or file=PATH of one layer.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if file != "" {
				b, err := os.ReadFile(file)
				if err != nil {
					return err
				}
				given := cfg
				if err := json.Unmarshal(b, &cfg); err != nil {
					return fmt.Errorf("read %s: %w", file, err)
				}
				for _, f := range []struct{ to, v *string }{
					{&cfg.Platform, &given.Platform},
					{&cfg.Layer, &given.Layer},
					{&cfg.TOCDigest, &given.TOCDigest},
					{&cfg.Registry.DockerConfig, &given.Registry.DockerConfig},
				} {
					if *f.v != "" {
						*f.to = *f.v
					}
				}
			}
			cfg.Reference = args[0]
			return stat(cmd.Context(), cfg, stdout, asJSON, *log)
		},
	}
	c.Flags().StringVar(&file, "config", "", "a `file` with the configuration of an image as JSON, for what has no flag")
	c.Flags().StringVar(&cfg.Platform, "platform", "", "which `platform` of an index: OS/ARCHITECTURE; without, linux on this machine's")
	c.Flags().StringVar(&cfg.Layer, "layer", "", "the `digest` of the only layer to look at")
	c.Flags().StringVar(&cfg.TOCDigest, "toc-digest", "", "the `digest` of the table of contents, of a layer without a manifest")
	c.Flags().BoolVar(&cfg.SkipVerify, "skip-verify", false, "take a table of contents of which no digest is known for what it should be")
	c.Flags().StringVar(&cfg.Registry.DockerConfig, "docker-config", "", "the `directory` of a docker config.json with credentials")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// stat prints what is known of an image's layers. It keeps nothing.
func stat(ctx context.Context, cfg imagefetch.Config, w io.Writer, asJSON bool, log *slog.Logger) error {
	cfg.Cache, cfg.Trace = imagefetch.CacheConfig{}, ""
	m, err := imagefetch.NewFetcher(log).Open(cfg)
	if err != nil {
		return err
	}
	defer m.Close()
	layers, err := m.Inspect(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(layers)
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "LAYER\tSIZE\tLAZY\tUNPACKED\tFILES\tCHUNKS\tPREFETCH")
	for _, l := range layers {
		if !l.Lazy {
			fmt.Fprintf(t, "%s\t%d\tno: %s\n", l.Digest, l.Size, l.Reason)
			continue
		}
		prefetch := "-"
		if l.Prefetch >= 0 {
			prefetch = strconv.FormatInt(l.Prefetch, 10)
		}
		fmt.Fprintf(t, "%s\t%d\t%s\t%d\t%d\t%d\t%s\n", l.Digest, l.Size, l.Kind, l.Unpacked, l.Files, l.Chunks, prefetch)
	}
	return t.Flush()
}

func prefetchListCommand(stdin io.Reader, stdout io.Writer) *cobra.Command {
	var paths bool
	c := &cobra.Command{
		Use:   "prefetch-list TRACE...",
		Short: "Make a prefetch list of traces",
		Long: `Makes a prefetch list of traces, or of other lists: a line for each file, those that were opened early first.

A TRACE is a file, or - for standard input.`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			var all []io.Reader
			for _, name := range args {
				if name == "-" {
					all = append(all, stdin)
					continue
				}
				f, err := os.Open(name)
				if err != nil {
					return err
				}
				defer f.Close()
				all = append(all, f)
			}
			list, err := imagefetch.PrefetchList(io.MultiReader(all...))
			if err != nil {
				return err
			}
			e := json.NewEncoder(stdout)
			e.SetEscapeHTML(false)
			for _, l := range list {
				if paths {
					_, err = fmt.Fprintln(stdout, l.Path)
				} else {
					err = e.Encode(l)
				}
				if err != nil {
					return err
				}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&paths, "paths", false, "print paths alone, as tools that build images take them")
	return c
}

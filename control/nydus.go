package control

import (
	"encoding/json"
	"net/http"
	"path"
	"slices"
	"strings"

	"github.com/sluicefs/sluice/control/api"
)

// The part of nydusd's API (nydus api/src/http_endpoint_v1.rs) that Kata's NydusClient uses, for clients that are there already.
// They act on one share; what is mounted are its grafts. Like nydusd it passes over parameters and fields that it does not know.

// nydusInfo is DaemonInfo of nydusd's OpenAPI document.
type nydusInfo struct {
	ID      string       `json:"id"`
	Version nydusVersion `json:"version"`
	State   string       `json:"state"`
}

type nydusVersion struct {
	PackageVer string `json:"package_ver"`
	GitCommit  string `json:"git_commit"`
	BuildTime  string `json:"build_time"`
	Profile    string `json:"profile"`
	Rustc      string `json:"rustc"`
}

// mountCmd is MountCmd of nydusd's OpenAPI document.
type mountCmd struct {
	FSType string `json:"fs_type"`
	Source string `json:"source"`
	Config string `json:"config"`
}

func nydusDaemon(c *call) error {
	info, err := c.server.cfg.Daemon.Info(c.Context())
	if err != nil {
		return err
	}
	// nydusd is RUNNING once front-ends can connect, and its clients start the VM only then.
	state := info.State
	if state == "READY" {
		state = "RUNNING"
	}
	return c.reply(http.StatusOK, nydusInfo{
		ID: info.ID, State: state,
		Version: nydusVersion{PackageVer: info.Version, Profile: "release"},
	})
}

// nydusTarget returns which share and which path in it the query means.
func nydusTarget(c *call) (tag, mountpoint string, err error) {
	q := c.URL.Query() // skips what it cannot parse, as nydusd does
	mountpoint = q.Get("mountpoint")
	switch {
	case mountpoint == "":
		return "", "", api.Errorf(api.CodeInvalid, "parameter \"mountpoint\" is missing: expected a path in the share, as in ?mountpoint=/data")
	case !strings.HasPrefix(mountpoint, "/"):
		return "", "", api.Errorf(api.CodeInvalid, "mountpoint %q is relative: expected an absolute path in the share", mountpoint)
	}
	mountpoint = path.Clean(mountpoint)
	if err := api.CheckPath(mountpoint); err != nil {
		return "", "", err
	}

	if tag = q.Get("tag"); tag == "" {
		tag = c.server.cfg.NydusShare
	}
	if tag == "" {
		shares, err := visibleShares(c)
		switch {
		case err != nil:
			return "", "", err
		case len(shares) == 0:
			return "", "", &api.Error{Code: api.CodeNotFound, Message: "there is no share to mount in", Hint: "add one: POST /v1/shares"}
		case len(shares) > 1:
			return "", "", &api.Error{Code: api.CodeInvalid, Message: "there is more than one share", Hint: "name one: &tag=TAG"}
		}
		tag = shares[0].Tag
	}
	if !c.allow().share(tag) {
		return "", "", noShare(tag)
	}
	return tag, mountpoint, nil
}

// nydusCommand returns the body.
func nydusCommand(c *call) (mountCmd, error) {
	var cmd mountCmd
	if err := json.Unmarshal(c.body, &cmd); err != nil {
		return cmd, describeJSON(err)
	}
	switch {
	case cmd.FSType == "rafs":
		return cmd, &api.Error{Code: api.CodeUnsupported, Message: "fs_type rafs: this daemon does not read nydus images", Hint: "mount a directory with fs_type passthrough_fs"}
	case cmd.FSType != "passthrough_fs":
		return cmd, api.Errorf(api.CodeInvalid, "fs_type is %q: expected passthrough_fs", cmd.FSType)
	case cmd.Source == "":
		return cmd, api.Errorf(api.CodeInvalid, "source is empty: expected a directory of the host")
	}
	return cmd, nil
}

func nydusMount(c *call) error {
	cmd, err := nydusCommand(c)
	if err != nil {
		return err
	}
	tag, at, err := nydusTarget(c)
	if err != nil {
		return err
	}
	spec := api.GraftSpec{Path: at, Source: cmd.Source, Backend: "passthrough"}
	if _, err := c.server.cfg.Daemon.AddGraft(c.Context(), tag, spec, false); err != nil {
		return err
	}
	return c.done()
}

// nydusRemount exchanges the source of what is mounted; its options stay.
func nydusRemount(c *call) error {
	cmd, err := nydusCommand(c)
	if err != nil {
		return err
	}
	tag, at, err := nydusTarget(c)
	if err != nil {
		return err
	}
	grafts, err := c.server.cfg.Daemon.Grafts(c.Context(), tag)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(grafts, func(g api.Graft) bool { return g.Path == at && !g.Leaving })
	if i < 0 {
		return api.Errorf(api.CodeNotFound, "nothing is mounted at %s", at)
	}
	spec := grafts[i].GraftSpec
	spec.Source, spec.Backend = cmd.Source, "passthrough"
	if _, err := c.server.cfg.Daemon.AddGraft(c.Context(), tag, spec, true); err != nil {
		return err
	}
	return c.done()
}

func nydusUmount(c *call) error {
	tag, at, err := nydusTarget(c)
	if err != nil {
		return err
	}
	if err := c.server.cfg.Daemon.RemoveGraft(c.Context(), tag, at); err != nil {
		return err
	}
	return c.done()
}
